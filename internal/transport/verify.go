package transport

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"hash"
	"io"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// Limits on documents that are held in memory, in bytes. Registries take
// manifests of 4 MiB; Docker's configurations stay far below.
const (
	maxManifest = 4 << 20
	maxConfig   = 8 << 20
)

// verified reads a blob and ends with io.EOF only if its bytes were those that
// the descriptor promised.
type verified struct {
	rc   io.ReadCloser
	want v1.Descriptor
	hash hash.Hash
	n    int64 // bytes read
	err  error
}

func verify(rc io.ReadCloser, want v1.Descriptor) (io.ReadCloser, error) {
	h, err := v1.Hasher(want.Digest.Algorithm)
	if err != nil {
		rc.Close()
		return nil, err
	}
	return &verified{rc: rc, want: want, hash: h}, nil
}

func (v *verified) Read(p []byte) (int, error) {
	if v.err != nil {
		return 0, v.err
	}
	n, err := v.rc.Read(p)
	v.n += int64(n)
	if v.n > v.want.Size {
		v.err = fmt.Errorf("blob %s: got more than the %d bytes of its descriptor", v.want.Digest, v.want.Size)
		return 0, v.err
	}
	v.hash.Write(p[:n])
	if errors.Is(err, io.EOF) {
		err = v.check()
	} else if err != nil {
		err = fmt.Errorf("blob %s at %d of %d bytes: %w", v.want.Digest, v.n, v.want.Size, err)
	}
	v.err = err
	return n, err
}

func (v *verified) check() error {
	if v.n != v.want.Size {
		return fmt.Errorf("blob %s: got %d bytes, want %d: %w", v.want.Digest, v.n, v.want.Size, io.ErrUnexpectedEOF)
	}
	if got := fmt.Sprintf("%x", v.hash.Sum(nil)); got != v.want.Digest.Hex {
		return fmt.Errorf("blob %s: its bytes have the digest %s:%s", v.want.Digest, v.want.Digest.Algorithm, got)
	}
	return io.EOF
}

func (v *verified) Close() error { return v.rc.Close() }

// readAll reads the whole of a small blob, verified.
func readAll(ctx context.Context, c contents, d v1.Descriptor, limit int64) ([]byte, error) {
	if d.Size < 0 || d.Size > limit {
		return nil, fmt.Errorf("blob %s: its descriptor claims %d bytes, at most %d are read", d.Digest, d.Size, limit)
	}
	rc, err := c.blob(ctx, d)
	if err != nil {
		return nil, err
	}
	if rc, err = verify(rc, d); err != nil {
		return nil, err
	}
	defer rc.Close()
	var buf bytes.Buffer
	if _, err := buf.ReadFrom(rc); err != nil {
		return nil, err
	}
	return bytes.Clone(buf.Bytes()), nil // the buffer has up to twice as much
}
