package e2e

import (
	"strings"
	"testing"

	"github.com/container-bootfs/bootfs/internal/testenv"
)

// TestCopied runs copies of an image after the registry that it was converted
// to is gone: one that is as it was, with the variable that copy names, and one
// that was rewritten, with none.
func TestCopied(t *testing.T) {
	t.Parallel()
	start := func() *testenv.Registry {
		r, err := testenv.StartRegistry(t.Context(), t.TempDir(), "")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { r.Close() })
		return r
	}
	first, second := start(), start()
	bootfs := func(args ...string) string {
		out, err := w.command(append([]string{"-q"}, args...)...).CombinedOutput()
		if err != nil {
			t.Fatalf("%s: %v\n%s", strings.Join(args, " "), err, out)
		}
		return string(out)
	}
	from, same, rewritten := first.Address+"/app:1", second.Address+"/copied/app:1", second.Address+"/rewritten/app:1"
	bootfs("--boot", w.boot, "oci:"+w.layout, from)
	_, setting, ok := strings.Cut(bootfs("copy", from, same), "set BLOB_STORE=")
	if !ok || strings.TrimSpace(setting) != "registry://"+second.Address+"/copied/app" {
		t.Fatalf("copy names %q", setting)
	}
	bootfs("copy", "--rewrite-store", from, rewritten)
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	program := []string{"python3", "-c", "import ssl, json; print('ok')"}
	runBeside(t, append([]string{"--env", "BLOB_STORE=" + strings.TrimSpace(setting), same}, program...)...).want(t, "ok\n")
	runBeside(t, append([]string{rewritten}, program...)...).want(t, "ok\n")
}
