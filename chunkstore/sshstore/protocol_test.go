package sshstore

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"math"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/container-bootfs/bootfs/chunkstore"
	"github.com/container-bootfs/bootfs/index"
	"github.com/container-bootfs/bootfs/internal/testenv/bounded"
)

var hello = message{kind: kindHello, number: featureReadableStore}.append(nil)

// header is a frame's header that may lie.
func header(k kind, size uint64) []byte {
	b := binary.LittleEndian.AppendUint64(nil, size)
	return binary.LittleEndian.AppendUint64(b, uint64(k))
}

// TestHostile: whatever a server sends after its hello, the reader gets an
// error soon, and one that says whether to try again.
func TestHostile(t *testing.T) {
	if !bounded.Test(t) {
		return
	}
	t.Parallel()
	id, stored := chunk(1, 3000)
	good := append(message{kind: kindChunk, number: chunkCompressed, id: id, data: len(stored)}.append(nil), stored...)
	file := filepath.Join(t.TempDir(), "answer")
	server := startServer(t, "ForceCommand head -c 24 "+file+"; head -c 80 >/dev/null; tail -c +25 "+file)
	for _, test := range []struct {
		name      string
		answer    []byte
		temporary bool
		want      string
	}{
		{"nothing", nil, true, "casync ended"},
		{"EOF in a header", good[:10], true, "unexpected EOF"},
		{"EOF in an id", good[:30], true, "unexpected EOF"},
		{"EOF in the data", good[:len(good)-1], true, "unexpected EOF"},
		{"length 2^63", header(kindChunk, 1<<63), false, "9223372036854775808 bytes"},
		{"length 2^64-1", header(kindChunk, math.MaxUint64), false, "18446744073709551615 bytes"},
		{"length 0", header(kindChunk, 0), false, "of 0 bytes"},
		{"no data", header(kindChunk, 56), false, "of 56 bytes, want 57"},
		{"beyond casync's limit", header(kindChunk, maxFrame+1), false, "16777217 bytes"},
		{"largest, cut", header(kindChunk, maxFrame), true, "unexpected EOF"},
		{"long missing", header(kindMissing, 49), false, "missing frame of 49 bytes"},
		{"unasked chunk", message{kind: kindMissing, id: index.ID{1}}.append(nil), false, "was not asked for"},
		{"request", append(message{kind: kindRequest, data: 32}.append(nil), make([]byte, 32)...), false, "got request"},
		{"second hello", hello, false, "got hello"},
		{"unknown kind", header(1, 16), false, "not casync's protocol"},
		{"text", []byte("Welcome to the server!\n"), false, `"Welcome to the s"`},
		{"abort", append(message{kind: kindAbort, number: 5, data: 10}.append(nil), "disk\x1b full\x00"...), true, "gave up: disk full (error 5)"},
		{"endless abort", header(kindAbort, 1<<20), false, "abort frame"},
		{"goodbye", message{kind: kindGoodbye}.append(nil), true, "casync ended"},
		{"missing", message{kind: kindMissing, id: id}.append(nil), true, "chunk not found"},
	} {
		t.Run(test.name, func(t *testing.T) {
			bounded.Case(t)
			write(t, file, string(hello)+string(test.answer))
			st := server.open("ssh", "/dir")
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
			defer cancel()
			_, err := st.Get(ctx, id, nil)
			if err == nil || ctx.Err() != nil || !strings.Contains(err.Error(), test.want) {
				t.Fatalf("got %v, want %q", err, test.want)
			}
			wantTemporary(t, err, test.temporary)
			if !st.budget.TryAcquire(budget) {
				t.Error("not all buffers were given back")
			}
		})
	}
	for _, compressed := range []bool{true, false} {
		answer := good
		want := stored
		if !compressed {
			plain := []byte("as it is")
			answer = append(message{kind: kindChunk, id: id, data: len(plain)}.append(nil), plain...)
			want = chunkstore.AppendRaw(nil, plain)
		}
		write(t, file, string(hello)+string(answer))
		if got, err := server.open("ssh", "/dir").Get(t.Context(), id, nil); err != nil || !bytes.Equal(got, want) {
			t.Errorf("a good answer: got %d bytes, %v", len(got), err)
		}
	}
}

// TestNotCasync: what answers a command, but not as casync, leads to SFTP.
func TestNotCasync(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	ids := fill(t, dir, 1)
	file := filepath.Join(t.TempDir(), "answer")
	for name, answer := range map[string][]byte{
		"nothing": nil, "text": []byte("Welcome to the server!\n"), "short": hello[:20], "other frame": message{kind: kindMissing}.append(nil),
		"no store": message{kind: kindHello, number: featurePullChunks}.append(nil), "long hello": header(kindHello, 1<<63),
	} {
		write(t, file, string(answer))
		server := startServer(t, "ForceCommand case \"$SSH_ORIGINAL_COMMAND\" in casync*) cat "+file+";; *) /usr/lib/openssh/sftp-server;; esac")
		if _, err := server.open("ssh", dir).Get(t.Context(), ids[0], nil); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	server := startServer(t, "ForceCommand exit 3")
	_, err := server.open("ssh", dir).Get(t.Context(), ids[0], nil)
	wantRefused(t, err, "no casync", "exit status 3", "no SFTP")
}

// FuzzReadMessage: nothing that a server sends makes the parser panic, or
// announce more data than is allowed; what it takes, it would write the same.
func FuzzReadMessage(f *testing.F) {
	id, stored := chunk(1, 300)
	for _, seed := range [][]byte{
		nil, hello, hello[:17], header(kindChunk, 1<<63), header(kindMissing, 48), header(0, 16),
		append(message{kind: kindChunk, number: 1, id: id, data: len(stored)}.append(nil), stored...),
		append(message{kind: kindRequest, data: 64}.append(nil), make([]byte, 64)...),
		append(message{kind: kindAbort, number: 5, data: 4}.append(hello), "why\x00"...),
		message{kind: kindGoodbye}.append(message{kind: kindMissing, id: id}.append(nil)),
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		r := bytes.NewReader(b)
		for {
			at := len(b) - r.Len()
			m, err := readMessage(r)
			if err != nil {
				if errors.Is(err, io.EOF) && at != len(b) {
					t.Errorf("got io.EOF within a frame at %d of %d bytes", at, len(b))
				}
				return
			}
			if m.data < 0 || m.data > maxFrame {
				t.Fatalf("got %d bytes of data", m.data)
			}
			if fixed := b[at : len(b)-r.Len()]; !bytes.Equal(m.append(nil), fixed) {
				t.Fatalf("read %x, would write %x", fixed, m.append(nil))
			}
			if m.kind == kindAbort {
				if readReason(r, m) == nil {
					t.Fatal("an abort without an error")
				}
				continue
			}
			if n, _ := io.CopyN(io.Discard, r, int64(m.data)); n < int64(m.data) {
				return
			}
		}
	})
}
