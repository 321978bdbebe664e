package chunkstore_test

import (
	"bytes"
	"testing"

	. "github.com/container-bootfs/bootfs/chunkstore"
	"github.com/container-bootfs/bootfs/index"
)

func TestFramesByHand(t *testing.T) {
	for _, n := range []int{1, 2, 255, 256, 65535, 65536, 128<<10 - 1, 128 << 10, 128<<10 + 1, 256 << 10, 1 << 20} {
		for name, plain := range map[string][]byte{"raw": bytes.Repeat([]byte("ab\x00"), n/3+1)[:n], "zeros": make([]byte, n)} {
			frame := AppendRaw([]byte("before"), plain)
			if name == "zeros" {
				frame = AppendZeros([]byte("before"), n)
			}
			frame, ok := bytes.CutPrefix(frame, []byte("before"))
			got, err := Decode(nil, frame, index.SHA256, index.Chunk{ID: index.SHA256.Sum(plain), Size: n})
			if !ok || err != nil || !bytes.Equal(got, plain) {
				t.Errorf("%s, %d bytes: got %d bytes, %v", name, n, len(got), err)
			}
		}
	}
}
