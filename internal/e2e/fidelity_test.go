package e2e

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/container-bootfs/bootfs/internal/testenv"
)

const fidelityPage = "../../docs/fidelity.md"

// maxRows is how many rows run at a time. Containers spend most of their time
// waiting for the engine.
const maxRows = 6

// A row is a thing that users do with an image, done with the source image and
// with the converted one in each mode.
type row struct {
	what string // as the page prints it
	// do returns what a user sees of it: output, exit status, effects. It is the
	// same for all subjects.
	do func(t *testing.T, s *subject) string
	// differs has the documented difference of a subject and its workaround, in
	// one sentence. What do returns must then differ.
	differs map[string]string
	// inSoak leaves the row to make soak, as others of its kind run in make test.
	inSoak bool
}

// A rowGroup is a table of the page.
type rowGroup struct {
	title string
	intro string // below the title, may be empty
	rows  []row
}

func rowGroups() []rowGroup {
	return []rowGroup{
		{"Command line", "", commandLineRows},
		{"Life of a container", "", lifeRows},
		{"Volumes and mounts", "", volumeRows},
		{"Root filesystem and isolation", "", rootfsRows},
	}
}

// furtherSections follow the tables on the page.
func furtherSections() []string { return []string{matrixSection(), engineSection()} }

// A subject is a way to run a program: the source image, or the converted one
// in a mode.
type subject struct {
	name  string // "source", or the mode
	image string
	flags []string // of docker run
}

// subjects are the source and then the modes, in the order of the page's columns.
// Quiet: how far a fill is, is said by one that takes long, which is the machine's.
var subjects = []*subject{
	{name: "source"},
	{name: "fuse", flags: []string{"--device", "/dev/fuse", "--cap-add", "SYS_ADMIN", "--env", "BOOTFS_MODE=fuse"}},
	{name: "fill", flags: []string{"--env", "BOOTFS_MODE=fill", "--env", "BOOTFS_LOG=quiet"}},
}

// converted reports whether the subject runs a converted image.
func (s *subject) converted() bool { return s.name != "source" }

// of returns the same way to run another image.
func (s *subject) of(t *testing.T, name string) *subject {
	t.Helper()
	source, converted := fidelityImage(t, name)
	other := *s
	other.image = source
	if s.converted() {
		other.image = converted
	}
	return &other
}

// args are the arguments of docker run: those of the subject before those of
// the row. The network is the host's unless the row names one.
func (s *subject) args(args []string) []string {
	all := slices.Clone(s.flags)
	options := args[:max(0, slices.Index(args, s.image))]
	switch {
	case anyHasPrefix(options, "--network"):
	case anyHasPrefix(options, ofItsOwnNetwork...):
		all = append(all, "--network", "host")
	default:
		all = append(all, "--network", w.hostNetwork)
	}
	return append(all, args...)
}

// ofItsOwnNetwork are options that a container cannot have in the network of
// another one.
var ofItsOwnNetwork = []string{"--hostname", "--add-host", "--dns", "--domainname", "--uts", "--publish", "--expose"}

func anyHasPrefix(list []string, prefixes ...string) bool {
	return slices.ContainsFunc(list, func(a string) bool {
		return slices.ContainsFunc(prefixes, func(p string) bool { return strings.HasPrefix(a, p) })
	})
}

// run runs a container to its end: docker run with args, among which is s.image.
func (s *subject) run(t *testing.T, args ...string) result {
	t.Helper()
	return s.runWith(t, nil, args...)
}

// runWith is run with stdin, which the container gets with -i among args.
func (s *subject) runWith(t *testing.T, stdin io.Reader, args ...string) result {
	t.Helper()
	return dockerWith(t, stdin, append([]string{"run", "--rm"}, s.args(args)...)...)
}

// start runs a container in the background until the test ends and returns its ID.
func (s *subject) start(t *testing.T, args ...string) string {
	t.Helper()
	r := docker(t, append([]string{"run", "--detach"}, s.args(args)...)...)
	if r.code != 0 {
		t.Fatalf("docker run %s: exit %d\n%s", strings.Join(args, " "), r.code, r.stderr)
	}
	id := strings.TrimSpace(r.stdout)
	removeAtEnd(t, id)
	return id
}

// create makes a container that is removed when the test ends and returns its ID.
func (s *subject) create(t *testing.T, args ...string) string {
	t.Helper()
	r := docker(t, append([]string{"create"}, s.args(args)...)...)
	if r.code != 0 {
		t.Fatalf("docker create %s: exit %d\n%s", strings.Join(args, " "), r.code, r.stderr)
	}
	id := strings.TrimSpace(r.stdout)
	removeAtEnd(t, id)
	return id
}

// String is the result as transcripts have it.
func (r result) String() string {
	return fmt.Sprintf("exit %d\nstdout:\n%s\nstderr:\n%s\n", r.code, r.stdout, r.stderr)
}

// ran is a row's do that runs the small image once, with args; "IMAGE" among
// them stands for the image.
func ran(args ...string) func(*testing.T, *subject) string { return ranOf("plain", args...) }

// ranOf is ran with another of the images.
func ranOf(name string, args ...string) func(*testing.T, *subject) string {
	return func(t *testing.T, s *subject) string {
		s = s.of(t, name)
		args := slices.Clone(args)
		for i := range args {
			if args[i] == "IMAGE" {
				args[i] = s.image
			}
		}
		return s.run(t, args...).String()
	}
}

// each is a row's do that does several, one after the other.
func each(do ...func(*testing.T, *subject) string) func(*testing.T, *subject) string {
	return func(t *testing.T, s *subject) string {
		var b strings.Builder
		for i, f := range do {
			fmt.Fprintf(&b, "-- %d\n%s", i+1, f(t, s))
		}
		return b.String()
	}
}

// smallPath is the PATH of the small images.
const smallPath = "PATH=/usr/local/bin:/usr/bin:/bin"

// smallConfigs are the configurations of the small image that rows run.
var smallConfigs = map[string]v1.Config{
	"plain": {Cmd: []string{"sh"}, Env: []string{smallPath}},
	"volumes": {Cmd: []string{"sh"}, Env: []string{smallPath}, User: "app",
		Volumes: map[string]struct{}{"/vol/full": {}, "/vol/empty": {}, "/vol/absent": {}}},
}

// fidelityLayouts are further images that rows run, by name.
var fidelityLayouts = map[string]func(*testenv.Cache, context.Context) (string, error){
	"files": (*testenv.Cache).FilesImage,
	"tools": (*testenv.Cache).ToolsImage,
}

// python is the name of the image with Python on Debian.
const python = "python"

var fidelityImages struct {
	sync.Mutex
	made map[string]func() (source, converted string, err error)
}

// fidelityImage returns the source image of a name and its converted form, in
// the engine. It is made when the first row asks for it.
func fidelityImage(t *testing.T, name string) (source, converted string) {
	t.Helper()
	if name == python {
		return w.source, w.image
	}
	layout, ok := fidelityLayouts[name]
	if config, small := smallConfigs[name]; small {
		layout = func(c *testenv.Cache, ctx context.Context) (string, error) { return c.SmallImage(ctx, name, config) }
	} else if !ok {
		t.Fatalf("no image of the name %s", name)
	}
	f := &fidelityImages
	f.Lock()
	if f.made == nil {
		f.made = map[string]func() (string, string, error){}
	}
	if f.made[name] == nil {
		var once sync.Once
		var source, converted string
		var err error
		f.made[name] = func() (string, string, error) {
			once.Do(func() { source, converted, err = makeImages(name, layout) })
			return source, converted, err
		}
	}
	made := f.made[name]
	f.Unlock()
	source, converted, err := made()
	if err != nil {
		t.Fatal(err)
	}
	return source, converted
}

func makeImages(name string, layout func(*testenv.Cache, context.Context) (string, error)) (source, converted string, err error) {
	ctx := context.Background()
	cache, err := testenv.OpenCache()
	if err != nil {
		return "", "", err
	}
	dir, err := layout(cache, ctx)
	if err != nil {
		return "", "", err
	}
	source, converted = w.proxy.address+"/small:"+name, w.proxy.address+"/small:"+name+"-converted"
	if err := testenv.Push(ctx, dir, source); err != nil {
		return "", "", err
	}
	if out, err := w.command("--boot", w.boot, "oci:"+dir, converted).CombinedOutput(); err != nil {
		return "", "", fmt.Errorf("convert: %w\n%s", err, out)
	}
	for _, image := range []string{source, converted} {
		if _, err := w.docker.Output(ctx, "pull", "--quiet", image); err != nil {
			return "", "", err
		}
	}
	return source, converted, nil
}

// TestFidelity does each row of the page with all subjects and compares what a
// user sees.
func TestFidelity(t *testing.T) {
	for _, g := range rowGroups() {
		t.Run(g.title, func(t *testing.T) {
			limit := make(chan struct{}, maxRows)
			var running sync.WaitGroup
			for _, r := range g.rows {
				if r.inSoak && os.Getenv("BOOTFS_FIDELITY") != "all" {
					continue
				}
				running.Go(func() {
					limit <- struct{}{}
					defer func() { <-limit }()
					t.Run(r.what, r.compare)
				})
			}
			running.Wait()
		})
	}
}

func (r *row) compare(t *testing.T) {
	got := make([]string, len(subjects))
	var running sync.WaitGroup
	for i, s := range subjects {
		running.Go(func() {
			t.Run(s.name, func(t *testing.T) { got[i] = r.do(t, s.of(t, "plain")) })
		})
	}
	running.Wait()
	for i, s := range subjects[1:] {
		same := got[0] == got[i+1]
		switch difference := r.differs[s.name]; {
		case !same && difference == "":
			t.Errorf("differs from the source image\nsource: %s\n%s: %s\nin these lines:\n%s", got[0], s.name, got[i+1], changedLines(got[0], got[i+1]))
		case same && difference != "":
			t.Errorf("%s: as with the source image, but the page says: %s\n%s", s.name, difference, got[0])
		}
	}
}

// changedLines shows the lines that only one of two texts has.
func changedLines(a, b string) string {
	var out strings.Builder
	for _, side := range []struct{ sign, text, other string }{{"-", a, b}, {"+", b, a}} {
		lines := strings.Split(side.other, "\n")
		for line := range strings.SplitSeq(side.text, "\n") {
			if !slices.Contains(lines, line) {
				fmt.Fprintf(&out, "%s %s\n", side.sign, line)
			}
		}
	}
	return out.String()
}

// TestFidelityPage compares the page with the rows.
func TestFidelityPage(t *testing.T) {
	page := writeFidelityPage()
	if *update {
		if err := os.WriteFile(fidelityPage, []byte(page), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	have, err := os.ReadFile(fidelityPage)
	if err != nil {
		t.Fatal(err)
	}
	if string(have) != page {
		t.Errorf("%s is not what the rows say: run go test ./internal/e2e -run TestFidelityPage -update", filepath.Base(fidelityPage))
	}
}

const fidelityIntro = `# A converted image beside its source

What a user does with an image, done with the source and with its converted form in each [mode](running.md). *same* means that output, exit
status and effects were equal; anything else is the difference, and what to do about it.

` + "`internal/e2e`" + ` runs each row in a real Docker engine (` + "`go test ./internal/e2e -run TestFidelity`" + `; one row with
` + "`-run 'TestFidelity/Command_line/NAME'`" + `) and fails when the outcome is another than the page says; some
rows run in ` + "`make soak`" + ` only (` + "`BOOTFS_FIDELITY=all`" + `). The page is written from the rows with
` + "`-run TestFidelityPage -update`" + `. Only what must differ from one container to the next is left out of the comparison: IDs, process numbers, times.
The converted image has the flags of its mode, and each image the same arguments. What a fill that takes long says of itself is switched off.
`

func writeFidelityPage() string {
	var b strings.Builder
	b.WriteString(fidelityIntro)
	for _, g := range rowGroups() {
		if len(g.rows) == 0 {
			continue
		}
		fmt.Fprintf(&b, "\n## %s\n\n", g.title)
		if g.intro != "" {
			fmt.Fprintf(&b, "%s\n\n", g.intro)
		}
		b.WriteString("| what |")
		for _, s := range subjects[1:] {
			fmt.Fprintf(&b, " %s |", s.name)
		}
		fmt.Fprintf(&b, "\n|---|%s\n", strings.Repeat("---|", len(subjects)-1))
		for _, r := range g.rows {
			fmt.Fprintf(&b, "| %s |", inTable(r.what))
			for _, s := range subjects[1:] {
				cell := "same"
				if d := r.differs[s.name]; d != "" {
					cell = d
				}
				fmt.Fprintf(&b, " %s |", inTable(cell))
			}
			b.WriteByte('\n')
		}
	}
	for _, section := range furtherSections() {
		fmt.Fprintf(&b, "\n%s", section)
	}
	return b.String()
}

func inTable(s string) string { return strings.ReplaceAll(s, "|", `\|`) }

var (
	fullID  = regexp.MustCompile(`\b[0-9a-f]{64}\b`)
	shortID = regexp.MustCompile(`\b[0-9a-f]{12}\b`)
)

// withoutIDs replaces the IDs of containers and images.
func withoutIDs(s string) string {
	return shortID.ReplaceAllString(fullID.ReplaceAllString(s, "ID"), "ID")
}
