package chunkstore_test

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/klauspost/compress/zstd"

	"github.com/container-bootfs/bootfs/chunker"
	. "github.com/container-bootfs/bootfs/chunkstore"
	"github.com/container-bootfs/bootfs/index"
)

// text returns n reproducible bytes that compress about as well as programs do.
func text(seed, n int) []byte {
	r := rand.New(rand.NewPCG(uint64(seed), 0))
	var b []byte
	for len(b) < n {
		if len(b) > 64 && r.IntN(3) > 0 {
			at := r.IntN(len(b) - 32)
			b = append(b, b[at:at+4+r.IntN(28)]...)
		} else {
			b = binary.LittleEndian.AppendUint64(b, r.Uint64()>>(r.IntN(48)))
		}
	}
	return b[:n]
}

func random(n int) []byte {
	b := make([]byte, n)
	rand.NewChaCha8([32]byte{1}).Read(b)
	return b
}

func chunkOf(d index.Digest, plain []byte) index.Chunk {
	return index.Chunk{ID: d.Sum(plain), Size: len(plain)}
}

func TestEncodeDecode(t *testing.T) {
	for _, d := range []index.Digest{index.SHA256, index.SHA512_256} {
		for _, n := range []int{1, 2, 127, 128, 65535, 65536, 65537, 128 << 10, 128<<10 + 1, 256 << 10, 1 << 20, chunker.MaxSize} {
			for name, plain := range map[string][]byte{"text": text(n, min(n, 1<<20)), "random": random(n), "zeros": make([]byte, n)} {
				n := len(plain)
				for way, encode := range map[string]func(dst, plain []byte) []byte{"Encode": Encode, "EncodeThoroughly": EncodeThoroughly} {
					frame, ok := bytes.CutPrefix(encode([]byte("before"), plain), []byte("before"))
					if !ok {
						t.Fatalf("%s, %d bytes: %s did not append", name, n, way)
					}
					if len(frame) > MaxStored {
						t.Errorf("%s, %d bytes: %s: got a frame of %d bytes, want at most %d", name, n, way, len(frame), MaxStored)
					}
					for _, dst := range [][]byte{nil, []byte("x"), make([]byte, 3, n+100), make([]byte, 0, n)} {
						got, err := Decode(dst, frame, d, chunkOf(d, plain))
						if err != nil || !bytes.Equal(got, append(bytes.Clone(dst), plain...)) {
							t.Errorf("%v, %s, %d bytes behind %d: %s: got %d bytes, %v", d, name, n, len(dst), way, len(got), err)
						}
					}
				}
			}
		}
	}
}

// TestEncodeGolden freezes the stored form of profile v1: packs are shared
// between images by their digest. If an update of the compressor changes it,
// the next conversion of every image uploads all of its packs anew.
func TestEncodeGolden(t *testing.T) {
	sum := sha256.New()
	for n := 1; n <= 256<<10; n *= 2 {
		sum.Write(Encode(nil, text(n, n)))
		sum.Write(Encode(nil, make([]byte, n)))
	}
	const want = "4130a9fa5e67e68970e90b21ed1997e71539741b64f90779eafd445bdff8e2b3"
	if got := hex.EncodeToString(sum.Sum(nil)); got != want {
		t.Errorf("SHA-256 of the frames: got %s, want %s", got, want)
	}
	zeros := "28b52ffd"
	if got := hex.EncodeToString(Encode(nil, make([]byte, 4096))); !strings.HasPrefix(got, zeros) || len(got) > 2*20 {
		t.Errorf("4096 zeros: got %s, want at most 20 bytes that start with %s", got, zeros)
	}
}

func TestEncodeDeterministic(t *testing.T) {
	want := Encode(nil, text(1, 100_000))
	var g sync.WaitGroup
	for w := range 8 {
		g.Go(func() {
			for i := range 20 {
				Encode(nil, text(w*100+i, 50_000)) // leaves traces in the encoder, if it can
				if !bytes.Equal(Encode(nil, text(1, 100_000)), want) {
					t.Error("got another frame for the same bytes")
				}
			}
		})
	}
	g.Wait()
}

// TestZstd: frames behind one another are what the zstd command reads, and
// each states its content size.
func TestZstd(t *testing.T) {
	var frames, plain []byte
	for i := range 10 {
		p := text(i, 1+i*20_000)
		frame := Encode(nil, p)
		var h zstd.Header
		if err := h.Decode(frame); err != nil || !h.HasFCS || h.FrameContentSize != uint64(len(p)) {
			t.Errorf("chunk %d: got header %+v, %v, want a content size of %d", i, h, err, len(p))
		}
		plain = append(plain, p...)
		frames = append(frames, frame...)
	}
	cmd := exec.Command("zstd", "-d", "-c")
	cmd.Stdin = bytes.NewReader(frames)
	got, err := cmd.Output()
	if err != nil || !bytes.Equal(got, plain) {
		t.Errorf("zstd -d: got %d bytes, %v, want %d", len(got), err, len(plain))
	}
}

// TestDecodeForeign reads frames as other tools write them: with a checksum,
// without a content size, in parts, at other levels.
func TestDecodeForeign(t *testing.T) {
	plain := text(1, 200_000)
	c := chunkOf(index.SHA256, plain)
	for _, args := range []string{"-1", "-19", "-19 --long=27", "--no-check", "--no-content-size", "-3 --no-content-size", "--ultra -22"} {
		cmd := exec.Command("zstd", append(strings.Fields(args), "-c")...)
		cmd.Stdin = bytes.NewReader(plain)
		frame, err := cmd.Output()
		if err != nil {
			t.Fatalf("zstd %s: %v", args, err)
		}
		if got, err := Decode(nil, frame, index.SHA256, c); err != nil || !bytes.Equal(got, plain) {
			t.Errorf("zstd %s: got %d bytes, %v", args, len(got), err)
		}
	}
}

func TestDecodeRefuses(t *testing.T) {
	plain := text(1, 10_000)
	frame := Encode(nil, plain)
	good := chunkOf(index.SHA256, plain)
	sized := func(n int) index.Chunk { return index.Chunk{ID: good.ID, Size: n} }
	for _, test := range []struct {
		name  string
		frame []byte
		c     index.Chunk
		want  string // in the error
	}{
		{"nothing", nil, good, "got 0 bytes, want 10000 bytes"},
		{"no zstd", []byte("not a frame at all"), good, "18 bytes that are no zstd frame"},
		{"first half", frame[:len(frame)/2], good, "no zstd frame"},
		{"without the last byte", frame[:len(frame)-1], good, "no zstd frame"},
		{"a byte behind", append(bytes.Clone(frame), 0), good, "no zstd frame"},
		{"a second frame behind", append(bytes.Clone(frame), frame...), good, "got more, want 10000 bytes"},
		{"shorter than declared", frame, sized(10_001), "got 10000 bytes, want 10001 bytes"},
		{"longer than declared", frame, sized(9_999), "got more, want 9999 bytes"},
		{"another chunk's", Encode(nil, text(2, 10_000)), good, "got sha256 "},
		{"a 9-byte frame of 512 MiB", []byte{0x28, 0xb5, 0x2f, 0xfd, 0xa0, 0, 0, 0, 0x20}, good, "want 10000 bytes"},
		{"a frame of 2^63 bytes", []byte{0x28, 0xb5, 0x2f, 0xfd, 0xe0, 0, 0, 0, 0, 0, 0, 0, 0x80}, good, "want 10000 bytes"},
		{"a window of 2 GiB", []byte{0x28, 0xb5, 0x2f, 0xfd, 0x00, 0xa8, 1, 0, 0}, good, "want 10000 bytes"},
		{"runs of zeros, 128 KiB each", append([]byte{0x28, 0xb5, 0x2f, 0xfd, 0x00, 0x58}, bytes.Repeat([]byte{0x02, 0x00, 0x10, 0}, 1000)...), good, "want 10000 bytes"},
	} {
		before := allocated()
		got, err := Decode([]byte("kept"), test.frame, index.SHA256, test.c)
		var corrupt *CorruptError
		if !errors.As(err, &corrupt) || corrupt.ID != good.ID || string(got) != "kept" {
			t.Errorf("%s: got %d bytes, error %v, want a *CorruptError", test.name, len(got), err)
			continue
		}
		if msg := err.Error(); !strings.Contains(msg, test.want) || !strings.Contains(msg, good.ID.String()) || strings.Contains(msg, "\n") {
			t.Errorf("%s: got error %q, want one line with the name and %q", test.name, msg, test.want)
		}
		if n := allocated() - before; n > 1<<20 {
			t.Errorf("%s: got %d bytes allocated, want at most 1 MiB", test.name, n)
		}
	}
	for _, n := range []int{-1, 0, chunker.MaxSize + 1, 1 << 62} {
		if _, err := Decode(nil, frame, index.SHA256, sized(n)); err == nil {
			t.Errorf("a chunk of %d bytes: got no error", n)
		}
	}
	if _, err := Decode(nil, frame, index.SHA512_256, good); err == nil {
		t.Error("the other digest: got no error")
	}
}

func allocated() uint64 {
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.TotalAlloc
}

// TestDecodeDamaged: of many damaged frames none yields wrong bytes.
func TestDecodeDamaged(t *testing.T) {
	plain := text(3, 20_000)
	frame := Encode(nil, plain)
	c := chunkOf(index.SHA256, plain)
	r := rand.New(rand.NewPCG(1, 2))
	var buf []byte
	for range 10_000 {
		bad := damage(r, frame)
		got, err := Decode(buf[:0], bad, index.SHA256, c)
		if err == nil && !bytes.Equal(got, plain) {
			t.Fatalf("got %d wrong bytes", len(got))
		}
		buf = got[:0]
	}
}

// damage returns a damaged copy of frame.
func damage(r *rand.Rand, frame []byte) []byte {
	bad := bytes.Clone(frame)
	switch i := r.IntN(len(bad)); r.IntN(5) {
	case 0: // flip a bit
		bad[i] ^= 1 << r.IntN(8)
	case 1: // cut off
		bad = bad[:i]
	case 2: // zeros, as a disk leaves them
		clear(bad[i:])
	case 3: // lose a part
		bad = slices.Delete(bad, i, min(i+1+r.IntN(100), len(bad)))
	case 4: // more behind it
		bad = append(bad, frame[:i]...)
	}
	return bad
}

func FuzzDecode(f *testing.F) {
	for _, n := range []int{1, 100, 70_000} {
		f.Add(Encode(nil, text(n, n)), n)
		f.Add(Encode(nil, make([]byte, n)), n)
	}
	f.Add([]byte{0x28, 0xb5, 0x2f, 0xfd, 0xa0, 0, 0, 0, 0x20}, 1000)
	f.Add([]byte{0x50, 0x2a, 0x4d, 0x18, 1, 0, 0, 0, 0}, 1)
	for _, n := range []int{0, 1, 5_000, 70_000} {
		for _, command := range []string{"cat", "gzip -n", "xz -6", "xz --check=none", "xz --x86 --lzma2=dict=4KiB", "xz --block-size=1000 -T2"} {
			f.Add(packed(f, text(n, n), command), n)
		}
	}
	f.Fuzz(func(t *testing.T, frame []byte, size int) {
		c := index.Chunk{Size: size}
		if plain := unpackOlder(frame); len(plain) > 0 {
			c.ID = index.SHA256.Sum(plain)
		} else if r, err := zstd.NewReader(nil, zstd.WithDecoderMaxMemory(1<<20)); err == nil {
			plain, _ := r.DecodeAll(frame, nil)
			c.ID = index.SHA256.Sum(plain)
			r.Close()
		}
		got, err := Decode(nil, frame, index.SHA256, c)
		if err == nil && (len(got) != size || index.SHA256.Sum(got) != c.ID) {
			t.Fatalf("got %d bytes, want %d that are named %s", len(got), size, c.ID)
		}
	})
}

// program returns n bytes of this program, which compress as programs do.
func program(b testing.TB, n int) []byte {
	f, err := os.Open(os.Args[0])
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close()
	p := make([]byte, n)
	if _, err := f.ReadAt(p, 1<<20); err != nil {
		b.Fatal(err)
	}
	return p
}

// TestEncodeThoroughly: what it costs is paid back, and what was encoded before,
// and by whom else at the same time, makes no difference.
func TestEncodeThoroughly(t *testing.T) {
	var chunks [][]byte
	whole := program(t, 2<<20)
	for n := 4 << 10; len(whole) > n; n += n / 4 {
		chunks = append(chunks, whole[:n])
		whole = whole[n:]
	}
	frames := make([][]byte, len(chunks))
	quick, thorough := 0, 0
	for i, plain := range chunks {
		frames[i] = EncodeThoroughly(nil, plain)
		quick, thorough = quick+len(Encode(nil, plain)), thorough+len(frames[i])
	}
	if thorough > quick*97/100 {
		t.Errorf("got %d bytes, and %d without the effort", thorough, quick)
	}
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for i, plain := range slices.Backward(chunks) {
				if !bytes.Equal(EncodeThoroughly(nil, plain), frames[i]) {
					t.Errorf("chunk %d: got another frame", i)
				}
			}
		})
	}
	wg.Wait()
}

// TestCodecDoesNotAllocate: with room in the buffers that it is given.
func TestCodecDoesNotAllocate(t *testing.T) {
	plain := program(t, 64<<10)
	c := chunkOf(index.SHA256, plain)
	frame, buf := make([]byte, 0, 2*len(plain)), make([]byte, 0, len(plain))
	for name, call := range map[string]func() error{
		"Encode": func() error { frame = Encode(frame[:0], plain); return nil },
		"Decode": func() (err error) { buf, err = Decode(buf[:0], Encode(frame[:0], plain), index.SHA256, c); return err },
	} {
		var failed error
		n := testing.AllocsPerRun(50, func() {
			if err := call(); err != nil {
				failed = err
			}
		})
		if n != 0 || failed != nil {
			t.Errorf("%s: got %v allocations, %v; want none", name, n, failed)
		}
	}
}

func BenchmarkEncode(b *testing.B) { benchmarkEncode(b, Encode) }

func BenchmarkEncodeThoroughly(b *testing.B) { benchmarkEncode(b, EncodeThoroughly) }

func benchmarkEncode(b *testing.B, encode func(dst, plain []byte) []byte) {
	for _, n := range []int{16 << 10, 64 << 10, 256 << 10} {
		b.Run(fmt.Sprint(n>>10, "KiB"), func(b *testing.B) {
			plain := program(b, n)
			var frame []byte
			b.SetBytes(int64(n))
			b.ReportAllocs()
			for b.Loop() {
				frame = encode(frame[:0], plain)
			}
			b.ReportMetric(float64(n)/float64(len(frame)), "ratio")
		})
	}
}

func BenchmarkDecode(b *testing.B) {
	for _, n := range []int{16 << 10, 64 << 10, 256 << 10} {
		b.Run(fmt.Sprint(n>>10, "KiB"), func(b *testing.B) {
			plain := program(b, n)
			frame := Encode(nil, plain)
			c := chunkOf(index.SHA256, plain)
			var buf []byte
			b.SetBytes(int64(n))
			b.ReportAllocs()
			for b.Loop() {
				var err error
				if buf, err = Decode(buf[:0], frame, index.SHA256, c); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
