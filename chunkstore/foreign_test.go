package chunkstore_test

import (
	"bytes"
	"compress/gzip"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"math/rand/v2"
	"os/exec"
	"strings"
	"testing"

	"github.com/mikelolasagasti/xz"

	"github.com/container-bootfs/bootfs/chunker"
	. "github.com/container-bootfs/bootfs/chunkstore"
	"github.com/container-bootfs/bootfs/index"
)

// packed returns what the command line, which reads standard input, makes of
// plain.
func packed(t testing.TB, plain []byte, command string) []byte {
	t.Helper()
	args := strings.Fields(command)
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Stdin = bytes.NewReader(plain)
	frame, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s: %v", command, err)
	}
	return frame
}

// TestDecodeOlder reads the forms that casync and desync store beside zstd.
func TestDecodeOlder(t *testing.T) {
	for _, n := range []int{1, 4095, 4096, 4097, 65536, 200_000, chunker.MaxSize} {
		plain := text(n, min(n, 300_000))
		plain = append(plain, make([]byte, n-len(plain))...)
		for _, d := range []index.Digest{index.SHA256, index.SHA512_256} {
			for _, command := range []string{
				"cat", "gzip -1", "gzip -9", "xz -0", "xz -6", "xz -9e", "xz --check=none", "xz --check=sha256",
				"xz --x86 --lzma2=dict=4KiB", "xz --lzma2=lc=0,lp=4,pb=0",
			} {
				if n == chunker.MaxSize && strings.Contains(command, "xz -") && command != "xz -0" {
					continue // the same, and long
				}
				frame := packed(t, plain, command)
				got, err := Decode([]byte("x"), frame, d, chunkOf(d, plain))
				if err != nil || !bytes.Equal(got, append([]byte("x"), plain...)) {
					t.Errorf("%s, %v, %d bytes: got %d bytes, %v", command, d, n, len(got), err)
				}
			}
		}
	}
}

// xzWithDictionary returns frame, whose first block has LZMA2 only, with
// another size of its dictionary, as xz writes it.
func xzWithDictionary(frame []byte, code byte) []byte {
	const header, at = 12, 4
	frame = bytes.Clone(frame)
	frame[header+at] = code
	n := int(frame[header]) * 4
	binary.LittleEndian.PutUint32(frame[header+n:], crc32.ChecksumIEEE(frame[header:header+n]))
	return frame
}

// TestDecodeMemory: a frame that declares a dictionary of 4 GiB, or unpacks to
// as much, costs no more than its chunk.
func TestDecodeMemory(t *testing.T) {
	plain := text(1, 10_000)
	good := chunkOf(index.SHA256, plain)
	zeros := make([]byte, 64<<20)
	small := packed(t, plain, "xz -6")
	for _, test := range []struct {
		name  string
		frame []byte
		want  string // in the error; "" for none
	}{
		{"xz, a dictionary of 1.5 GiB", xzWithDictionary(small, 37), ""},
		{"xz, a dictionary of 4 GiB", xzWithDictionary(small, 40), ""},
		{"xz, a dictionary of no size", xzWithDictionary(small, 41), ""},
		{"xz, 64 MiB behind another filter", packed(t, plain, "xz --x86 --lzma2=dict=64MiB"), "no xz frame"},
		{"xz, 8 MiB in the second block", packed(t, plain, "xz -T2 --block-size=4096"), "no xz frame"},
		{"xz, 64 MiB of zeros", packed(t, zeros, "xz -6"), "got more, want 10000 bytes"},
		{"gzip, 64 MiB of zeros", packed(t, zeros, "gzip -9"), "got more, want 10000 bytes"},
		{"gzip, a name without end", append([]byte{0x1f, 0x8b, 8, 8, 0, 0, 0, 0, 0, 0}, bytes.Repeat([]byte{'a'}, 1<<20)...), "no gzip frame"},
		{"gzip, 50,000 empty members", bytes.Repeat(packed(t, nil, "gzip -n"), 50_000), "got 0 bytes, want 10000 bytes"},
		{"xz, 50,000 empty streams", bytes.Repeat(packed(t, nil, "xz"), 50_000), "no xz frame"},
	} {
		Decode(nil, test.frame, index.SHA256, good) // what is kept for the next time is not counted
		before := allocated()
		got, err := Decode(nil, test.frame, index.SHA256, good)
		if n := allocated() - before; n > 256<<10 {
			t.Errorf("%s: got %d bytes allocated, want at most 256 KiB", test.name, n)
		}
		if test.want == "" {
			if err != nil || !bytes.Equal(got, plain) {
				t.Errorf("%s: got %d bytes, %v", test.name, len(got), err)
			}
			continue
		}
		var corrupt *CorruptError
		if !errors.As(err, &corrupt) || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: got %v, want a *CorruptError with %q", test.name, err, test.want)
		}
	}
}

func TestDecodeOlderRefuses(t *testing.T) {
	plain := text(1, 10_000)
	good := chunkOf(index.SHA256, plain)
	sized := func(n int) index.Chunk { return index.Chunk{ID: good.ID, Size: n} }
	type test struct {
		name  string
		frame []byte
		c     index.Chunk
		want  string // in the error
	}
	tests := []test{
		{"plain, another chunk's", text(2, 10_000), good, "no zstd frame"},
		{"plain, too short", plain[1:], good, "no zstd frame"},
		{"gzip, its magic", []byte{0x1f, 0x8b}, good, "2 bytes that are no gzip frame"},
		{"xz, its magic", []byte("\xfd7zXZ\x00"), good, "6 bytes that are no xz frame"},
	}
	for _, name := range []string{"gzip", "xz"} {
		frame := packed(t, plain, name)
		for _, cut := range []int{len(frame) / 2, len(frame) - 9, len(frame) - 1} {
			tests = append(tests, test{fmt.Sprint(name, ", first ", cut), frame[:cut], good, "no " + name + " frame"})
		}
		tests = append(tests,
			test{name + ", a byte behind", append(bytes.Clone(frame), 1), good, "no " + name + " frame"},
			test{name + ", another frame behind", append(bytes.Clone(frame), frame...), good, "is corrupt"},
			test{name + ", shorter than declared", frame, sized(10_001), "got 10000 bytes, want 10001 bytes"},
			test{name + ", longer than declared", frame, sized(9_999), "got more, want 9999 bytes"},
			test{name + ", another chunk's", packed(t, text(2, 10_000), name), good, "got sha256 "})
	}
	for _, test := range tests {
		got, err := Decode([]byte("kept"), test.frame, index.SHA256, test.c)
		var corrupt *CorruptError
		if !errors.As(err, &corrupt) || corrupt.ID != good.ID || string(got) != "kept" {
			t.Errorf("%s: got %d bytes, error %v, want a *CorruptError", test.name, len(got), err)
			continue
		}
		if !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: got error %q, want one with %q", test.name, err, test.want)
		}
	}
}

// TestDecodeOlderDamaged: of many damaged frames none yields wrong bytes.
func TestDecodeOlderDamaged(t *testing.T) {
	plain := text(3, 5_000)
	c := chunkOf(index.SHA256, plain)
	r := rand.New(rand.NewPCG(1, 2))
	var buf []byte
	for _, command := range []string{"gzip", "xz", "xz --check=none"} {
		frame := packed(t, plain, command)
		for range 3_000 {
			got, err := Decode(buf[:0], damage(r, frame), index.SHA256, c)
			if err == nil && !bytes.Equal(got, plain) {
				t.Fatalf("%s: got %d wrong bytes", command, len(got))
			}
			buf = got[:0]
		}
	}
}

// unpackOlder unpacks what casync stored before it had zstd, with a limit.
func unpackOlder(frame []byte) []byte {
	var r io.Reader
	var err error
	if bytes.HasPrefix(frame, []byte{0x1f, 0x8b}) {
		r, err = gzip.NewReader(bytes.NewReader(frame))
	} else {
		r, err = xz.NewReader(bytes.NewReader(frame), 16<<20)
	}
	if err != nil {
		return nil
	}
	plain, _ := io.ReadAll(io.LimitReader(r, 1<<20))
	return plain
}
