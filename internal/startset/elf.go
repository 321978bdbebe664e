package startset

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"iter"
	"path"
	"slices"
	"strings"

	"github.com/container-bootfs/bootfs/internal/tree"
)

// Limits of what is read of one ELF file, in bytes or entries. Package
// debug/elf reads sections whole, and a sparse file may declare terabytes.
const (
	maxProgs   = 512
	maxDynamic = 64 << 10
	maxString  = 4 << 10
	maxNeeded  = 512
)

// object is what the loader learns from an ELF file.
type object struct {
	class   elf.Class
	machine elf.Machine
	interp  string   // PT_INTERP, "" if there is none
	needed  []string // DT_NEEDED
	rpath   string   // DT_RUNPATH, else DT_RPATH
}

// object adds the loader and the libraries of the ELF file n, breadth first as
// the loader maps them. A file that is no ELF needs nothing more.
func (s *search) object(p string, n *tree.Inode) {
	main, err := readObject(n)
	if err != nil {
		return
	}
	if main.interp != "" {
		if i, in := s.regular(s.abs(main.interp)); in != nil {
			s.add(i)
		}
	}
	if len(main.needed) > 0 {
		for _, f := range []string{"/etc/ld.so.preload", "/etc/ld.so.cache"} {
			if f, n := s.regular(f); n != nil {
				s.add(f)
			}
		}
	}
	type mapped struct {
		dir string // of the file, for $ORIGIN
		o   object
	}
	loaded := map[string]bool{} // by name: as the loader, search for each once
	for queue := []mapped{{path.Dir(p), main}}; len(queue) > 0; queue = queue[1:] {
		at := queue[0]
		for _, name := range at.o.needed {
			if loaded[name] {
				continue
			}
			lib, n, o := s.library(name, at.o, at.dir)
			loaded[name] = n != nil
			if n != nil && s.add(lib) {
				queue = append(queue, mapped{path.Dir(lib), o})
			}
		}
	}
}

// library finds a DT_NEEDED name as the loader does, of the same machine.
func (s *search) library(name string, from object, origin string) (string, *tree.Inode, object) {
	try := func(p string) (string, *tree.Inode, object) {
		p, n := s.regular(p)
		if n == nil {
			return "", nil, object{}
		}
		o, err := readObject(n)
		s.left -= len(o.needed)
		if err != nil || o.class != from.class || o.machine != from.machine {
			return "", nil, object{}
		}
		return p, n, o
	}
	if strings.Contains(name, "/") {
		return try(s.abs(name))
	}
	for dir := range s.libraryDirs(from, origin) {
		if s.left <= 0 {
			break
		}
		if p, n, o := try(s.abs(path.Join(dir, name))); n != nil {
			return p, n, o
		}
	}
	return "", nil, object{}
}

// libraryDirs yields the directories that the loader searches for a library of
// from, which lies in origin.
func (s *search) libraryDirs(from object, origin string) iter.Seq[string] {
	return func(yield func(string) bool) {
		expand := strings.NewReplacer("${ORIGIN}", origin, "$ORIGIN", origin)
		for dir := range strings.SplitSeq(from.rpath, ":") {
			if dir != "" && !yield(expand.Replace(dir)) {
				return
			}
		}
		for _, dir := range s.libraryPath {
			if !yield(expand.Replace(dir)) {
				return
			}
		}
		dirs := slices.Clone(s.loaderDirs())
		if a := multiarch[from.machine]; a != "" {
			dirs = append(dirs, "/lib/"+a, "/usr/lib/"+a)
		}
		if from.class == elf.ELFCLASS64 {
			dirs = append(dirs, "/lib64", "/usr/lib64")
		}
		for _, dir := range append(dirs, "/lib", "/usr/lib", "/usr/local/lib") {
			if !yield(dir) {
				return
			}
		}
	}
}

// multiarch names Debian's library directory of a machine.
var multiarch = map[elf.Machine]string{
	elf.EM_X86_64:  "x86_64-linux-gnu",
	elf.EM_AARCH64: "aarch64-linux-gnu",
	elf.EM_ARM:     "arm-linux-gnueabihf",
	elf.EM_386:     "i386-linux-gnu",
	elf.EM_PPC64:   "powerpc64le-linux-gnu",
	elf.EM_S390:    "s390x-linux-gnu",
	elf.EM_RISCV:   "riscv64-linux-gnu",
}

// loaderDirs reads the directories that the loaders are configured with:
// glibc's ld.so.conf with its includes, and musl's path file.
func (s *search) loaderDirs() []string {
	if s.read {
		return s.conf
	}
	s.read = true
	files := []string{"/etc/ld.so.conf"}
	if _, etc := s.tree.Resolve("/etc"); etc != nil && etc.IsDir() {
		for _, name := range etc.Names() {
			if ok, _ := path.Match("ld-musl-*.path", name); ok {
				files = append(files, path.Join("/etc", name))
			}
		}
	}
	for i := 0; i < len(files) && i < maxFiles; i++ {
		if slices.Contains(files[:i], files[i]) {
			continue // files may include one another
		}
		for _, line := range strings.FieldsFunc(s.text(files[i]), func(r rune) bool { return r == '\n' || r == ':' }) {
			line, _, _ = strings.Cut(line, "#")
			words := strings.Fields(line)
			switch {
			case len(words) == 2 && words[0] == "include":
				files = append(files, s.glob(path.Join(path.Dir(files[i]), words[1]), words[1])...)
			case len(words) == 1 && path.IsAbs(words[0]) && len(s.conf) < maxFiles && !slices.Contains(s.conf, words[0]):
				s.conf = append(s.conf, words[0])
			}
		}
	}
	return s.conf
}

// text returns the beginning of a small configuration file, "" if it is not there.
func (s *search) text(p string) string {
	_, n := s.regular(p)
	if n == nil {
		return ""
	}
	b := make([]byte, min(n.Size, maxDynamic))
	k, _ := n.ReadAt(b, 0)
	return string(b[:k])
}

// glob expands the last element of an include pattern.
func (s *search) glob(joined, given string) []string {
	if path.IsAbs(given) {
		joined = given
	}
	dir, pattern := path.Split(joined)
	_, n := s.tree.Resolve(path.Clean(dir))
	if n == nil || !n.IsDir() {
		return nil
	}
	if s.left -= len(n.Entries); s.left < 0 {
		return nil
	}
	var out []string
	for _, name := range n.Names() {
		if ok, err := path.Match(pattern, name); err == nil && ok {
			out = append(out, path.Join(dir, name))
		}
	}
	return out
}

var errNoObject = errors.New("not an ELF file")

// readObject reads what the loader would: the program headers and the dynamic
// section that they point to, never section headers, which may be stripped.
func readObject(r io.ReaderAt) (object, error) {
	var ident [elf.EI_NIDENT]byte
	if _, err := r.ReadAt(ident[:], 0); err != nil || string(ident[:4]) != elf.ELFMAG {
		return object{}, errNoObject
	}
	var bo binary.ByteOrder = binary.LittleEndian
	if elf.Data(ident[elf.EI_DATA]) == elf.ELFDATA2MSB {
		bo = binary.BigEndian
	}
	o := object{class: elf.Class(ident[elf.EI_CLASS])}
	var progs []elf.ProgHeader
	switch o.class {
	case elf.ELFCLASS64:
		var h elf.Header64
		if err := readStruct(r, bo, 0, &h); err != nil {
			return object{}, err
		}
		o.machine = elf.Machine(h.Machine)
		if h.Phnum > maxProgs || int(h.Phentsize) != binary.Size(elf.Prog64{}) {
			return object{}, fmt.Errorf("%d program headers of %d bytes", h.Phnum, h.Phentsize)
		}
		raw := make([]elf.Prog64, h.Phnum)
		if err := readStruct(r, bo, int64(h.Phoff), raw); err != nil {
			return object{}, err
		}
		for _, p := range raw {
			progs = append(progs, elf.ProgHeader{Type: elf.ProgType(p.Type), Off: p.Off, Vaddr: p.Vaddr, Filesz: p.Filesz})
		}
	case elf.ELFCLASS32:
		var h elf.Header32
		if err := readStruct(r, bo, 0, &h); err != nil {
			return object{}, err
		}
		o.machine = elf.Machine(h.Machine)
		if h.Phnum > maxProgs || int(h.Phentsize) != binary.Size(elf.Prog32{}) {
			return object{}, fmt.Errorf("%d program headers of %d bytes", h.Phnum, h.Phentsize)
		}
		raw := make([]elf.Prog32, h.Phnum)
		if err := readStruct(r, bo, int64(h.Phoff), raw); err != nil {
			return object{}, err
		}
		for _, p := range raw {
			progs = append(progs, elf.ProgHeader{Type: elf.ProgType(p.Type), Off: uint64(p.Off), Vaddr: uint64(p.Vaddr), Filesz: uint64(p.Filesz)})
		}
	default:
		return object{}, errNoObject
	}
	for _, p := range progs {
		switch p.Type {
		case elf.PT_INTERP:
			o.interp = readString(r, int64(p.Off), p.Filesz)
		case elf.PT_DYNAMIC:
			if err := o.dynamic(r, bo, p, progs); err != nil {
				return object{}, err
			}
		}
	}
	return o, nil
}

// dynamic reads the entries of the dynamic section d.
func (o *object) dynamic(r io.ReaderAt, bo binary.ByteOrder, d elf.ProgHeader, progs []elf.ProgHeader) error {
	raw := make([]byte, min(d.Filesz, maxDynamic))
	if _, err := r.ReadAt(raw, int64(d.Off)); err != nil && err != io.EOF {
		return err
	}
	word := func(b []byte) uint64 { return bo.Uint64(b) }
	size := 8
	if o.class == elf.ELFCLASS32 {
		word, size = func(b []byte) uint64 { return uint64(bo.Uint32(b)) }, 4
	}
	var table uint64 // address of the string table
	var needed []uint64
	var rpath, runpath uint64
	for ; len(raw) >= 2*size && elf.DynTag(word(raw)) != elf.DT_NULL; raw = raw[2*size:] {
		v := word(raw[size:])
		switch elf.DynTag(word(raw)) {
		case elf.DT_STRTAB:
			table = v
		case elf.DT_NEEDED:
			if len(needed) < maxNeeded {
				needed = append(needed, v)
			}
		case elf.DT_RPATH:
			rpath = v
		case elf.DT_RUNPATH:
			runpath = v
		}
	}
	i := slices.IndexFunc(progs, func(p elf.ProgHeader) bool {
		return p.Type == elf.PT_LOAD && table >= p.Vaddr && table-p.Vaddr < p.Filesz
	})
	if i < 0 {
		return nil // a static program without a string table in the file
	}
	base := progs[i].Off + (table - progs[i].Vaddr)
	for _, v := range needed {
		if name := readString(r, int64(base+v), maxString); name != "" {
			o.needed = append(o.needed, name)
		}
	}
	if runpath == 0 {
		runpath = rpath
	}
	if runpath != 0 {
		o.rpath = readString(r, int64(base+runpath), maxString)
	}
	return nil
}

func readStruct(r io.ReaderAt, bo binary.ByteOrder, off int64, v any) error {
	if off < 0 {
		return errNoObject
	}
	return binary.Read(io.NewSectionReader(r, off, int64(binary.Size(v))), bo, v)
}

// readString returns the bytes up to a NUL, "" when there is none within limit.
func readString(r io.ReaderAt, off int64, limit uint64) string {
	if off < 0 {
		return ""
	}
	b := make([]byte, min(limit, maxString))
	k, _ := r.ReadAt(b, off)
	s, _, ok := bytes.Cut(b[:k], []byte{0})
	if !ok {
		return ""
	}
	return string(s)
}
