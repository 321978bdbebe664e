// Package archtest holds the tests of the module's shape: which package may
// import which, and that every dependency has a reason.
package archtest

import (
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"strings"
	"testing"
)

const module = "github.com/container-bootfs/bootfs"

// levels are the product's packages, lowest first. A package imports only
// those of lower levels, so each can be understood without what stands above
// it, and packages of one level without one another.
var levels = [][]string{
	{"chunker", "internal/answer", "internal/tree", "internal/bootimage", "internal/bootbin", "internal/httpio", "internal/scratch"},
	{"index", "internal/metrics", "internal/hosts", "internal/erofs", "internal/layer", "internal/startset", "internal/treecmp", "internal/unpack"},
	{"chunkstore", "internal/convcache", "internal/rootimage", "internal/reads", "internal/lazy", "mount"},
	{"chunkstore/httpstore", "chunkstore/local", "chunkstore/s3store", "chunkstore/sshstore", "registrystore", "internal/fill"},
	{"chunkstore/nodecache", "internal/stores", "internal/transport"},
	{"internal/assembly"},
	{"internal/converted"},
	{"internal/convert", "internal/boot"},
	{"cmd/bootfs-boot", "cmd/bootfs-cache", "cmd/bootfs-convert"},
}

// helpers serve building and testing; nothing of the product imports them.
var helpers = []string{
	"chunkstore/storetest", "internal/archtest", "internal/bootbin/gen", "internal/demo",
	"internal/e2e", "internal/faultproxy", "internal/freeport", "internal/testenv", "internal/testenv/bounded", "internal/testenv/fsprobe", "internal/testenv/testapp", "internal/testenv/webapp", "samples/ci", "samples/kubernetes",
}

// barred are packages that one must not depend on, not even through others. A
// pattern ending in /... stands for all below it too.
var barred = []struct {
	pkg string
	not []string
	why string
}{
	{
		pkg: "index", not: []string{"net", "os/exec"},
		why: "it works on bytes in memory",
	},
	{
		pkg: "chunkstore", not: []string{"net", "os/exec"},
		why: "stores that reach elsewhere are packages of their own",
	},
	{
		pkg: "mount", not: []string{module + "/chunkstore/...", module + "/registrystore", "net/http"},
		why: "it serves bytes and does not know where they come from",
	},
	{
		pkg: "cmd/bootfs-boot",
		not: []string{
			module + "/internal/transport", module + "/internal/assembly", module + "/internal/convert", module + "/internal/layer", module + "/internal/rootimage",
			"github.com/google/go-containerregistry/pkg/v1/daemon", "github.com/google/go-containerregistry/pkg/v1/layout",
			"github.com/google/go-containerregistry/pkg/v1/remote", "github.com/google/go-containerregistry/pkg/v1/tarball",
			"github.com/moby/moby/...", "github.com/spf13/cobra", "github.com/vbauerster/mpb/...",
		},
		why: "it is in every image and starts before everything else: only what it needs is linked",
	},
}

// listed is what go list says of a package.
type listed struct {
	ImportPath string
	Imports    []string
	Deps       []string
}

func list(t *testing.T) map[string]listed {
	t.Helper()
	cmd := exec.Command("go", "list", "-json=ImportPath,Imports,Deps", module+"/...")
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	all := map[string]listed{}
	for d := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p listed
		if err := d.Decode(&p); errors.Is(err, io.EOF) {
			return all
		} else if err != nil {
			t.Fatal(err)
		}
		all[strings.TrimPrefix(p.ImportPath, module+"/")] = p
	}
}

func TestImports(t *testing.T) {
	level := map[string]int{}
	for i, names := range levels {
		for _, name := range names {
			level[name] = i
		}
	}
	isHelper := map[string]bool{}
	for _, name := range helpers {
		isHelper[name] = true
	}
	all := list(t)
	for name, p := range all {
		if isHelper[name] {
			continue
		}
		own, ok := level[name]
		if !ok {
			t.Errorf("package %s has no place: give it one in levels, or in helpers", name)
			continue
		}
		for _, path := range p.Imports {
			imported, ok := strings.CutPrefix(path, module+"/")
			switch {
			case !ok:
			case isHelper[imported]:
				t.Errorf("%s imports %s, which is for building and testing", name, imported)
			case level[imported] >= own:
				t.Errorf("%s (level %d) imports %s (level %d): imports point downwards", name, own, imported, level[imported])
			}
		}
	}
	for _, b := range barred {
		p, ok := all[b.pkg]
		if !ok {
			t.Errorf("barred names package %s, which is not there", b.pkg)
		}
		for _, dep := range p.Deps {
			for _, pattern := range b.not {
				below, all := strings.CutSuffix(pattern, "/...")
				if dep == pattern || all && (dep == below || strings.HasPrefix(dep, below+"/")) {
					t.Errorf("%s depends on %s: %s", b.pkg, dep, b.why)
				}
			}
		}
	}
}

// TestDependenciesHaveReasons wants a line in docs/dependencies.md for each
// module that this one, or one of those below it, requires directly.
func TestDependenciesHaveReasons(t *testing.T) {
	doc, err := os.ReadFile("../../docs/dependencies.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range []string{"../../go.mod", "../evaluation/go.mod", "../evaluation/stargz/go.mod"} {
		out, err := exec.Command("go", "mod", "edit", "-json", file).Output()
		if err != nil {
			t.Fatal(err)
		}
		var mod struct {
			Require []struct {
				Path     string
				Indirect bool
			}
		}
		if err := json.Unmarshal(out, &mod); err != nil {
			t.Fatal(err)
		}
		for _, m := range mod.Require {
			if !m.Indirect && m.Path != module && !strings.Contains(string(doc), "| `"+m.Path+"` |") {
				t.Errorf("docs/dependencies.md has no line for %s, which %s requires", m.Path, file)
			}
		}
	}
}
