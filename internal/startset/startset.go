// Package startset says which files of a root filesystem its program reads
// before it does anything of its own, by looking at the files alone.
//
// It follows what the kernel and the dynamic loader would: the program on
// PATH, its "#!" interpreters, its ELF interpreter and the libraries that it
// and they need; and, behind all that, the programs whose names stand in scripts
// of a shell. Nothing is executed, and a file that cannot be understood is
// taken as it is: a guess that misses costs a request at start, never an error.
package startset

import (
	"bytes"
	"path"
	"slices"
	"strings"

	"github.com/container-bootfs/bootfs/internal/bootimage"
	"github.com/container-bootfs/bootfs/internal/tree"
)

// Limits of the search. Real programs stay far below; hostile trees end here.
const (
	maxFiles   = 2000     // files in a start set
	maxLookups = 200_000  // places that are looked at for them
	maxWords   = 256      // words of a command line that are looked up
	maxScript  = 5        // "#!" levels; the kernel allows as many
	maxText    = 64 << 10 // bytes of a script that are looked at
)

// Program is what an image's configuration says about its process.
type Program struct {
	Args       []string // Entrypoint followed by Cmd
	Env        []string // "KEY=value"; PATH and LD_LIBRARY_PATH count
	WorkingDir string   // "" is "/"
}

// Files returns the regular files that p reads at its start, as paths without
// symlinks, each once, in the order in which they are read.
func Files(t *tree.Tree, p Program) []string {
	s := &search{tree: t, program: p, left: maxLookups, seen: map[string]bool{}}
	s.path = s.env("PATH")
	if s.path == "" {
		s.path = bootimage.DefaultPath
	}
	s.libraryPath = strings.FieldsFunc(s.env("LD_LIBRARY_PATH"), func(r rune) bool { return r == ':' })
	s.words(p.Args)
	// What a script runs is a guess: it comes behind what is certain.
	for i := 0; i < len(s.scripts); i++ {
		s.commands(s.scripts[i])
	}
	return s.files
}

// search is one walk. Its methods add what they find to files.
type search struct {
	tree    *tree.Tree
	program Program
	files   []string
	seen    map[string]bool
	left    int           // of maxLookups
	scripts []*tree.Inode // of shells, among files

	path        string   // as PATH has it
	libraryPath []string // directories of LD_LIBRARY_PATH
	conf        []string // library directories of /etc/ld.so.conf, read once
	read        bool     // conf is valid
}

// words adds the program args[0], and those of its arguments that are programs
// or files themselves: entry point scripts end in exec "$@", interpreters are
// given a script, and sh -c a line of commands.
func (s *search) words(args []string) {
	for i, a := range args[:min(len(args), maxWords)] {
		if i > 1 && strings.HasPrefix(args[i-1], "-") && strings.HasSuffix(args[i-1], "c") && slices.ContainsFunc(args[:i-1], isShell) {
			line := strings.FieldsFunc(a, betweenWords)
			for _, w := range line[:min(len(line), maxWords)] {
				s.word(w)
			}
			continue
		}
		s.word(a)
	}
}

// betweenWords reports whether r separates words in a shell's language.
func betweenWords(r rune) bool { return strings.ContainsRune(" \t\n;|&()<>\"'`", r) }

// commands adds the programs that a script of a shell names.
func (s *search) commands(n *tree.Inode) {
	text := make([]byte, min(n.Size, maxText))
	k, _ := n.ReadAt(text, 0)
	known := make(map[string]bool)
	for line := range strings.Lines(string(text[:k])) {
		for _, w := range strings.FieldsFunc(line, betweenWords) {
			if strings.HasPrefix(w, "#") {
				break // the rest is a comment
			}
			if known[w] {
				continue
			}
			known[w] = true
			p, ok := w, path.IsAbs(w)
			if !ok && !strings.Contains(w, "/") {
				p, ok = s.lookPath(w)
			}
			if !ok {
				continue
			}
			if _, n := s.regular(path.Clean(p)); n != nil && n.Mode&0o111 != 0 {
				s.exec(path.Clean(p), 0)
			}
		}
	}
}

func isShell(name string) bool {
	return slices.Contains([]string{"sh", "bash", "dash", "ash", "busybox", "zsh"}, path.Base(name))
}

// word adds the file that a word of a command line names, if it names one.
func (s *search) word(w string) {
	if w == "" || len(w) > 4096 {
		return
	}
	if strings.Contains(w, "/") {
		s.exec(s.abs(w), 0)
		return
	}
	if p, ok := s.lookPath(w); ok {
		s.exec(p, 0)
		return
	}
	s.exec(s.abs(w), 0) // a script in the working directory
}

func (s *search) abs(p string) string {
	if !path.IsAbs(p) {
		p = path.Join("/", s.program.WorkingDir, p)
	}
	return path.Clean(p)
}

// lookPath finds an executable as a shell does.
func (s *search) lookPath(name string) (string, bool) {
	for dir := range strings.SplitSeq(s.path, ":") {
		if s.left <= 0 {
			break
		}
		p := s.abs(path.Join(dir, name))
		if _, n := s.regular(p); n != nil && n.Mode&0o111 != 0 {
			return p, true
		}
	}
	return "", false
}

// env returns the value of a variable; of several, engines take the last.
func (s *search) env(key string) string {
	for _, e := range slices.Backward(s.program.Env) {
		if v, ok := strings.CutPrefix(e, key+"="); ok {
			return v
		}
	}
	return ""
}

// regular resolves p and returns it if it is a regular file, else nil.
func (s *search) regular(p string) (string, *tree.Inode) {
	if s.left--; s.left < 0 {
		return "", nil
	}
	p, n := s.tree.Resolve(p)
	if n == nil || !n.IsRegular() {
		return "", nil
	}
	return p, n
}

// add notes a file and says whether it is new and worth looking into.
func (s *search) add(p string) bool {
	if s.seen[p] || len(s.files) >= maxFiles {
		return false
	}
	s.seen[p] = true
	s.files = append(s.files, p)
	return true
}

// exec adds the file at p with everything that executing it reads. depth
// counts "#!" levels.
func (s *search) exec(p string, depth int) {
	p, n := s.regular(p)
	if n == nil || !s.add(p) {
		return
	}
	head := make([]byte, 256)
	k, _ := n.ReadAt(head, 0)
	head = head[:k]
	if line, ok := bytes.CutPrefix(head, []byte("#!")); ok && depth < maxScript {
		line, _, _ = bytes.Cut(line, []byte("\n"))
		words := strings.Fields(string(line))
		if slices.ContainsFunc(words[:min(len(words), 2)], isShell) { // or by env
			s.scripts = append(s.scripts, n)
		}
		s.interpreter(words, depth)
		return
	}
	s.object(p, n)
}

// interpreter adds the program of a "#!" line. For env, that is two programs.
func (s *search) interpreter(args []string, depth int) {
	if len(args) == 0 {
		return
	}
	s.exec(s.abs(args[0]), depth+1)
	if path.Base(args[0]) != "env" {
		return
	}
	for _, a := range args[1:] {
		if strings.HasPrefix(a, "-") || strings.Contains(a, "=") {
			continue // env's own options and assignments
		}
		if p, ok := s.lookPath(a); ok {
			s.exec(p, depth+1)
		}
		return
	}
}
