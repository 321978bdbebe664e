package sshstore

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/container-bootfs/bootfs/chunker"
	"github.com/container-bootfs/bootfs/chunkstore"
	"github.com/container-bootfs/bootfs/index"
)

// TestCasyncClient: casync puts an image together, over ssh, from chunks that
// were written by SFTP; and what casync stored, here or over ssh, is read over
// ssh by casync's protocol and by SFTP.
func TestCasyncClient(t *testing.T) {
	t.Parallel()
	server := startServer(t)
	dir := t.TempDir()
	plain := make([]byte, 2<<20)
	rand.NewChaCha8([32]byte{1}).Read(plain)
	copy(plain[1<<20:], make([]byte, 512<<10))

	store := filepath.Join(dir, "ours.castr")
	st := server.open("sftp", store)
	var file bytes.Buffer
	w := index.NewWriter(&file, chunker.V1, index.SHA256)
	cutter, err := chunker.New(chunker.V1)
	if err != nil {
		t.Fatal(err)
	}
	for rest := plain; len(rest) > 0; {
		n := cutter.Cut(rest)
		id := index.SHA256.Sum(rest[:n])
		if err := st.Put(t.Context(), id, chunkstore.Encode(nil, rest[:n])); err != nil {
			t.Fatal(err)
		}
		if err := w.Append(id, n); err != nil {
			t.Fatal(err)
		}
		rest = rest[n:]
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	caibx := filepath.Join(dir, "ours.caibx")
	write(t, caibx, file.String())
	known := filepath.Join(dir, "known_hosts")
	write(t, known, server.hostKey+"\n")
	host, port, _ := net.SplitHostPort(server.addr)
	ssh := filepath.Join(dir, "ssh")
	write(t, ssh, fmt.Sprintf("#!/bin/sh\nexec ssh -F none -p %s -i %s -o UserKnownHostsFile=%s -o BatchMode=yes \"$@\"\n", port, server.key, known))
	if err := os.Chmod(ssh, 0o700); err != nil {
		t.Fatal(err)
	}
	out := filepath.Join(dir, "out")
	casync(t, ssh, "extract", "--store=root@"+host+":"+store, caibx, out)
	if got, err := os.ReadFile(out); err != nil || !bytes.Equal(got, plain) {
		t.Errorf("casync extract: got %d bytes, %v, want the image's %d", len(got), err, len(plain))
	}

	for i, test := range []struct{ compression, at, scheme string }{
		{"zstd", "", "ssh"},
		{"xz", "", "ssh"},
		{"gzip", "", "sftp"},
		{"zstd", "root@" + host + ":", "ssh"},
		{"xz", "root@" + host + ":", "sftp"},
	} {
		d := []index.Digest{index.SHA256, index.SHA512_256}[i%2]
		theirs := filepath.Join(dir, fmt.Sprint(i, ".castr"))
		if test.at != "" { // casync makes none at the other end
			if err := os.Mkdir(theirs, 0o755); err != nil {
				t.Fatal(err)
			}
		}
		caibx := filepath.Join(dir, fmt.Sprint(i, ".caibx"))
		casync(t, ssh, "make", "--digest="+d.String(), "--compression="+test.compression, "--store="+test.at+theirs, test.at+caibx, out)
		b, err := os.ReadFile(caibx)
		if err != nil {
			t.Fatal(err)
		}
		x, err := index.Open(b)
		if err != nil {
			t.Fatal(err)
		}
		f := chunkstore.NewFetcher(chunkstore.FetcherOptions{Digest: d, Stores: []chunkstore.Store{server.open(test.scheme, theirs)}})
		defer f.Close()
		for i := range x.Len() {
			c, err := x.At(i)
			if err != nil {
				t.Fatal(err)
			}
			got, err := f.Fetch(t.Context(), c, nil)
			if err != nil || !bytes.Equal(got, plain[c.Offset:c.Offset+int64(c.Size)]) {
				t.Errorf("%+v, chunk %d: got %d bytes, %v", test, i, len(got), err)
			}
		}
	}
}

func casync(t *testing.T, ssh string, args ...string) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "casync", args...)
	cmd.Env = append(os.Environ(), "CASYNC_SSH_PATH="+ssh)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("casync %v: %v\n%s", args, err, out)
	}
}
