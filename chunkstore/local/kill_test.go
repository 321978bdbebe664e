package local

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/container-bootfs/bootfs/chunkstore"
	"github.com/container-bootfs/bootfs/internal/testenv"
)

// writeOnce puts or removes one chunk and ends, for TestKilledAtEachCall.
func writeOnce(whatAndDir string) {
	what, dir, _ := strings.Cut(whatAndDir, " ")
	var opts []Option
	if what == "flush" {
		opts = append(opts, Batched())
	}
	s, err := Open(dir, opts...)
	if err != nil {
		panic(err)
	}
	id, frame := chunk(1, 30000)
	ctx := context.Background()
	testenv.MarkCalls()
	switch what {
	case "put":
		err = s.Put(ctx, id, frame)
	case "flush":
		if err = s.Put(ctx, id, frame); err == nil {
			err = s.Flush(ctx)
		}
	case "remove":
		err = s.Remove(ctx, id)
	case "expire":
		_, err = s.Expire(ctx, id, time.Now().Add(time.Hour))
	}
	if err != nil {
		panic(err)
	}
	os.Exit(0)
}

// TestKilledAtEachCall kills a process that writes or removes a chunk at each
// system call that it makes. Afterwards the chunk is there whole or as it was
// before, the same works, and what is left over is one file that Sweep removes.
func TestKilledAtEachCall(t *testing.T) {
	id, frame := chunk(1, 30000)
	_, damaged := chunk(2, 100)
	write := func(file string, b []byte) error {
		return errors.Join(os.MkdirAll(filepath.Dir(file), 0o755), os.WriteFile(file, b, 0o644))
	}
	for _, test := range []struct {
		name string
		what string
		make func(file string) error // what stands in the chunk's place before
		old  []byte                  // what Get returns of that
	}{
		{"nothing", "put", func(string) error { return nil }, nil},
		{"subdirectory", "put", func(file string) error { return os.Mkdir(filepath.Dir(file), 0o755) }, nil},
		{"nothing", "flush", func(string) error { return nil }, nil},
		{"damaged chunk", "flush", func(file string) error { return write(file, damaged) }, damaged},
		{"damaged chunk", "put", func(file string) error { return write(file, damaged) }, damaged},
		{"empty file", "put", func(file string) error { return write(file, nil) }, nil},
		{"link", "put", func(file string) error {
			return errors.Join(os.Mkdir(filepath.Dir(file), 0o755), os.Symlink("elsewhere", file))
		}, nil},
		{"directory", "put", func(file string) error { return os.MkdirAll(file, 0o755) }, nil},
		{"file for a subdirectory", "put", func(file string) error { return os.WriteFile(filepath.Dir(file), nil, 0o644) }, nil},
		{"chunk", "remove", func(file string) error { return write(file, frame) }, frame},
		{"old chunk", "expire", func(file string) error { return write(file, frame) }, frame},
	} {
		t.Run(test.name+", "+test.what, func(t *testing.T) {
			t.Parallel()
			for n := 1; ; n++ {
				dir := t.TempDir()
				file := path(dir, id)
				if err := test.make(file); err != nil {
					t.Fatal(err)
				}
				cmd := exec.Command(os.Args[0])
				// Nothing of the runtime's own between the calls that count.
				cmd.Env = append(os.Environ(), "BOOTFS_TEST_ONCE="+test.what+" "+dir, "GOMAXPROCS=1", "GOGC=off", "GODEBUG=asyncpreemptoff=1")
				killed, err := testenv.KillAtCall(cmd, n)
				if err != nil {
					t.Fatal(err)
				}
				puts := test.what == "put" || test.what == "flush"
				s := create(t, dir)
				got, err := s.Get(t.Context(), id, nil)
				switch {
				case err == nil && bytes.Equal(got, frame) && (killed || puts):
				case err == nil && test.old != nil && bytes.Equal(got, test.old) && killed:
				case err != nil && test.old == nil && killed:
				case errors.Is(err, chunkstore.ErrNotFound) && !puts:
				default:
					t.Fatalf("killed at call %d (%v): got %d bytes, %v, want the chunk or what was before", n, killed, len(got), err)
				}
				if left := hidden(t, dir); len(left) > 1 || !killed && len(left) > 0 {
					t.Errorf("killed at call %d (%v): left over: %q", n, killed, left)
				}
				if err := s.Put(t.Context(), id, frame); err != nil {
					t.Errorf("killed at call %d: Put: %v", n, err)
				}
				if got, err := s.Get(t.Context(), id, nil); err != nil || !bytes.Equal(got, frame) {
					t.Errorf("killed at call %d: Get behind Put: got %d bytes, %v", n, len(got), err)
				}
				if _, _, err := s.Sweep(t.Context(), time.Now().Add(time.Hour), false); err != nil {
					t.Error(err)
				}
				if left := hidden(t, dir); len(left) > 0 {
					t.Errorf("killed at call %d: left over behind Sweep: %q", n, left)
				}
				if !killed {
					t.Logf("killed at each of %d calls", n-1)
					if n < 6 {
						t.Error("a chunk cannot be written or removed with so few")
					}
					return
				}
			}
		})
	}
}

// hidden returns the files of the store that are no chunks.
func hidden(t *testing.T, dir string) []string {
	t.Helper()
	left, err := filepath.Glob(filepath.Join(dir, "*", ".*"))
	if err != nil {
		t.Fatal(err)
	}
	return left
}
