package nodecache

import (
	"errors"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/container-bootfs/bootfs/chunkstore"
	"github.com/container-bootfs/bootfs/chunkstore/storetest"
	"github.com/container-bootfs/bootfs/index"
)

func open(t testing.TB, dir string, o Options) *Cache {
	t.Helper()
	c, err := Open(dir, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// chunk returns the name and the stored form of n bytes that seed decides.
func chunk(seed uint64, n int) (index.ID, []byte) {
	plain := make([]byte, n)
	r := rand.New(rand.NewPCG(seed, 0))
	for i := range plain {
		plain[i] = byte(r.Uint32())
	}
	return index.SHA256.Sum(plain), chunkstore.Encode(nil, plain)
}

func TestContract(t *testing.T) {
	storetest.Run(t, func() chunkstore.Writer { return open(t, filepath.Join(t.TempDir(), "a", "b.castr"), Options{}) })
}

// TestMarker: the first chunk marks the cache, looking at it does not.
func TestMarker(t *testing.T) {
	dir := t.TempDir()
	c := open(t, dir, Options{})
	if entries, _ := os.ReadDir(dir); len(entries) > 0 {
		t.Errorf("opened: got %v, want nothing yet", entries)
	}
	id, frame := chunk(1, 100)
	if err := c.Put(t.Context(), id, frame); err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(filepath.Join(dir, markerName)); err != nil || string(got) != `{"version":1}`+"\n" {
		t.Errorf("marker: got %q, %v", got, err)
	}
	if temps, _ := filepath.Glob(filepath.Join(dir, tempPrefix+"*")); len(temps) > 0 {
		t.Errorf("left behind: %v", temps)
	}
	open(t, dir, Options{})
}

// TestUnknownFormat: a cache of another version, or with a marker that cannot be
// read, is refused in one line and stays as it is.
func TestUnknownFormat(t *testing.T) {
	for _, test := range []struct {
		name string
		make func(file string) error
		want string
	}{
		{"newer", func(f string) error { return os.WriteFile(f, []byte(`{"version":99}`), 0o644) }, "format 99"},
		{"empty", func(f string) error { return os.WriteFile(f, nil, 0o644) }, "not understood"},
		{"no JSON", func(f string) error { return os.WriteFile(f, []byte("hello\nworld"), 0o644) }, "not understood"},
		{"huge", func(f string) error {
			if err := os.WriteFile(f, []byte(`{"version":1,"x":"`), 0o644); err != nil {
				return err
			}
			return os.Truncate(f, 1<<40)
		}, "not understood"},
		{"FIFO", func(f string) error { return unix.Mkfifo(f, 0o644) }, "cannot be read"},
		{"link", func(f string) error { return os.Symlink("/etc/hostname", f) }, "cannot be read"},
		{"directory", func(f string) error { return os.Mkdir(f, 0o755) }, "cannot be read"},
	} {
		t.Run(test.name, func(t *testing.T) {
			dir := t.TempDir()
			if err := test.make(filepath.Join(dir, markerName)); err != nil {
				t.Fatal(err)
			}
			_, err := Open(dir, Options{})
			var version *VersionError
			if !errors.As(err, &version) || !strings.Contains(err.Error(), test.want) || strings.Contains(err.Error(), "\n") {
				t.Errorf("got %v, want one line with %q", err, test.want)
			}
			if entries, _ := os.ReadDir(dir); len(entries) != 1 {
				t.Errorf("got %v, want the marker alone", entries)
			}
		})
	}
}

func TestParseSize(t *testing.T) {
	for s, want := range map[string]int64{
		"0": 0, "1": 1, "4096": 4096, "12B": 12, "1KiB": 1024, "1kB": 1000, "1KB": 1000, "20GiB": 20 << 30, "1.5TB": 1.5e12, "2TiB": 2 << 40, "3MB": 3e6, "3MiB": 3 << 20,
	} {
		if got, err := ParseSize(s); err != nil || got != want {
			t.Errorf("%q: got %d, %v, want %d", s, got, err, want)
		}
	}
	for _, s := range []string{"", "GiB", "-1", "-1GiB", "1 GiB", "1e9", "0x10", "inf", "NaN", "1GB/s", "9223372036854775808", "99999999TiB", "1.2.3", "5%"} {
		if got, err := ParseSize(s); err == nil || strings.Contains(err.Error(), "\n") {
			t.Errorf("%q: got %d, %v, want an error", s, got, err)
		}
	}
}

func TestParseReserve(t *testing.T) {
	for s, want := range map[string]int64{"5%": 50, "0.5%": 5, "0": 0, "0%": 0, "2GiB": 2 << 30} {
		r, err := ParseReserve(s)
		if err != nil || r.of(1000) != want {
			t.Errorf("%q: got %d of 1000, %v, want %d", s, r.of(1000), err, want)
		}
	}
	for _, s := range []string{"", "%", "100%", "-1%", "1e1%", "NaN%", "x", "5 %"} {
		if _, err := ParseReserve(s); err == nil || strings.Contains(err.Error(), "\n") {
			t.Errorf("%q: got %v, want an error", s, err)
		}
	}
	if got := DefaultReserve.of(100 << 30); got != 5<<30 {
		t.Errorf("of 100 GiB: got %d, want 5 GiB", got)
	}
	if got := DefaultReserve.of(math.MaxInt64 / 2); got != 10<<30 {
		t.Errorf("of a huge file system: got %d, want 10 GiB", got)
	}
}
