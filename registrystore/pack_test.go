package registrystore

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/container-bootfs/bootfs/chunkstore"
	"github.com/container-bootfs/bootfs/index"
)

func discard(context.Context, Pack) error { return nil }

// numbered returns a name that is as good as random.
func numbered(i int) index.ID {
	return index.SHA256.Sum(binary.LittleEndian.AppendUint64(nil, uint64(i)))
}

// writePacks writes one frame of size bytes for each number.
func writePacks(t *testing.T, numbers []int, size int, sink func(context.Context, Pack) error) []PackDescriptor {
	t.Helper()
	w := NewPackWriter(t.Context(), t.TempDir(), sink)
	frame := make([]byte, size)
	for _, n := range numbers {
		id := numbered(n)
		copy(frame, id[:])
		if _, err := w.Append(id, frame, false); err != nil {
			t.Fatal(err)
		}
	}
	packs, err := w.Close()
	if err != nil {
		t.Fatal(err)
	}
	return packs
}

func count(from, to int) []int {
	var n []int
	for ; from < to; from++ {
		n = append(n, from)
	}
	return n
}

func TestPackSizes(t *testing.T) {
	const frame = 256 << 10
	packs := writePacks(t, count(0, 2000), frame, discard) // 500 MiB
	var sum int64
	for i, p := range packs {
		sum += p.Size
		if p.Size > MaxPack || p.Size < MinPack && i < len(packs)-1 {
			t.Errorf("pack %d: %d bytes, want %d to %d", i, p.Size, MinPack, MaxPack)
		}
	}
	if sum != 2000*frame {
		t.Errorf("packs hold %d bytes, want %d", sum, 2000*frame)
	}
	if mean := sum / int64(len(packs)); mean < 16<<20 || mean > 32<<20 {
		t.Errorf("packs of %d bytes on average, want about 24 MiB", mean)
	}
}

// TestPacksAfterInsertion proves that packs end by content: those behind an
// insertion and a deletion are the same again.
func TestPacksAfterInsertion(t *testing.T) {
	t.Parallel()
	const frame = 128 << 10
	before := make(map[string]bool)
	for _, p := range writePacks(t, count(0, 2400), frame, discard) {
		before[p.Digest] = true
	}
	changed := append([]int{5001, 5002, 5003}, count(0, 1200)...)
	changed = append(changed, count(1210, 2400)...)
	after := writePacks(t, changed, frame, discard)
	fresh := 0
	for _, p := range after {
		if !before[p.Digest] {
			fresh++
		}
	}
	t.Logf("%d of %d packs are new after two changes", fresh, len(after))
	if fresh > 6 || fresh == len(after) {
		t.Errorf("%d of %d packs are new after two changes, want a few", fresh, len(after))
	}
}

func TestPackBounds(t *testing.T) {
	w := NewPackWriter(t.Context(), t.TempDir(), discard)
	big := make([]byte, chunkstore.MaxStored)
	for _, bad := range [][]byte{nil, make([]byte, chunkstore.MaxStored+1)} {
		if _, err := w.Append(numbered(0), bad, true); err == nil {
			t.Errorf("a frame of %d bytes was taken", len(bad))
		}
	}
	// The start set fills packs to the last byte: 4 × 16 MiB, and one more.
	const perPack = MaxPack / chunkstore.MaxStored
	for i := range perPack {
		at, err := w.Append(numbered(i), big, true)
		if want := (Location{0, int64(i) * chunkstore.MaxStored, chunkstore.MaxStored}); err != nil || at != want {
			t.Fatalf("got %v, %v, want %v", at, err, want)
		}
	}
	for i, want := range []Location{{1, 0, 1}, {1, 1, 2}} {
		if at, err := w.Append(numbered(i), big[:want.Length], true); err != nil || at != want {
			t.Fatalf("got %v, %v, want %v", at, err, want)
		}
	}
	// The rest goes to other packs, also when the start set comes again.
	for i, start := range []bool{false, true, false} {
		if at, err := w.Append(numbered(i), big[:5], start); err != nil || at != (Location{2 + i, 0, 5}) {
			t.Fatalf("got %v, %v, want pack %d", at, err, 2+i)
		}
	}
	packs, err := w.Close()
	if err != nil {
		t.Fatal(err)
	}
	want := []PackDescriptor{{Size: MaxPack, Start: true}, {Size: 3, Start: true}, {Size: 5}, {Size: 5, Start: true}, {Size: 5}}
	for i, p := range packs {
		if p.Size != want[i].Size || p.Start != want[i].Start {
			t.Errorf("pack %d: got %+v, want %+v", i, p, want[i])
		}
	}
}

func TestNoPacks(t *testing.T) {
	packs, err := NewPackWriter(t.Context(), t.TempDir(), discard).Close()
	if err != nil || len(packs) != 0 {
		t.Errorf("got %v, %v, want no packs", packs, err)
	}
}

// TestZstdReadsPacks has the zstd command as judge of the format.
func TestZstdReadsPacks(t *testing.T) {
	im := newImage(t, 200)
	if len(im.packs) < 2 {
		t.Fatalf("got %d packs, want several", len(im.packs))
	}
	want := make([][]byte, len(im.packs))
	seen := make(map[Location]bool)
	for pos := range im.index.Len() {
		at, err := im.locators.At(pos)
		if err != nil {
			t.Fatal(err)
		}
		if at.Length > 0 && !seen[at] {
			seen[at] = true
			c, _ := im.index.At(pos)
			want[at.Pack] = append(want[at.Pack], im.plain[c.ID]...)
		}
	}
	for i, p := range im.packs {
		r, err := p.Open()
		if err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command("zstd", "-d", "-c")
		cmd.Stdin = r
		var stderr bytes.Buffer
		cmd.Stderr = &stderr
		got, err := cmd.Output()
		if err != nil {
			t.Fatalf("zstd -d: %v: %s", err, stderr.Bytes())
		}
		if !bytes.Equal(got, want[i]) {
			t.Errorf("pack %d: zstd -d gave %d bytes, want the %d of the chunks in order", i, len(got), len(want[i]))
		}
	}
}

func TestPackSinkFails(t *testing.T) {
	errFull := errors.New("the registry is full")
	dir := t.TempDir()
	w := NewPackWriter(t.Context(), dir, func(_ context.Context, p Pack) error {
		if _, err := p.Open(); err != nil {
			t.Error(err)
		}
		return errFull
	})
	var err error
	for i := 0; err == nil; i++ {
		if i > 100*MaxPack/(8<<20) {
			t.Fatal("frames are taken for ever")
		}
		_, err = w.Append(numbered(i), make([]byte, 8<<20), false)
	}
	if !errors.Is(err, errFull) {
		t.Errorf("got %v, want the sink's error", err)
	}
	if _, err := w.Close(); !errors.Is(err, errFull) {
		t.Errorf("Close: got %v, want the sink's error", err)
	}
	if left, _ := filepath.Glob(filepath.Join(dir, "*")); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

func TestPackWriterCancelled(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	w := NewPackWriter(ctx, t.TempDir(), func(ctx context.Context, _ Pack) error {
		<-ctx.Done()
		return ctx.Err()
	})
	if _, err := w.Append(numbered(1), []byte("x"), false); err != nil {
		t.Fatal(err)
	}
	cancel()
	if packs, err := w.Close(); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, %v, want %v", packs, err, context.Canceled)
	}
}

func TestPackWriterWithoutSpace(t *testing.T) {
	w := NewPackWriter(t.Context(), filepath.Join(t.TempDir(), "missing"), discard)
	if _, err := w.Append(numbered(1), []byte("x"), false); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("got %v, want %v", err, os.ErrNotExist)
	}
	w.Close()
}

func BenchmarkPackWriter(b *testing.B) {
	frame := make([]byte, 32<<10)
	b.SetBytes(int64(len(frame)))
	w := NewPackWriter(b.Context(), b.TempDir(), func(_ context.Context, p Pack) error {
		r, err := p.Open()
		if err != nil {
			return err
		}
		_, err = io.Copy(io.Discard, r)
		return err
	})
	for i := 0; b.Loop(); i++ {
		if _, err := w.Append(numbered(i), frame, false); err != nil {
			b.Fatal(err)
		}
	}
	if _, err := w.Close(); err != nil {
		b.Fatal(err)
	}
}
