package main

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/container-bootfs/bootfs/chunkstore"
	"github.com/container-bootfs/bootfs/index"
	"github.com/container-bootfs/bootfs/internal/convert"
	"github.com/container-bootfs/bootfs/internal/stores"
)

// isIndexFile reports whether name is an index in a file rather than an image:
// it is called one, or is one.
func isIndexFile(name string) bool {
	if strings.HasSuffix(name, ".caibx") {
		return true
	}
	f, err := openRegular(name)
	if err != nil {
		return false
	}
	defer f.Close()
	head := make([]byte, 16)
	n, _ := io.ReadFull(f, head)
	return index.Sniff(head[:n])
}

func openRegular(name string) (*os.File, error) {
	// Without O_NONBLOCK, opening a FIFO would wait for its writer.
	f, err := os.OpenFile(name, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = errors.New("not a plain file")
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// maxIndexFile is the size of the largest index that is read from a file, in
// bytes: one of a terabyte or more.
const maxIndexFile = 1 << 30

// readIndexFile reads and checks the index in a file.
func readIndexFile(name string) (*index.Index, error) {
	failed := func(err error) (*index.Index, error) {
		return nil, &convert.Error{Part: convert.Source, Err: fmt.Errorf("%s: %w", name, bare(err))}
	}
	f, err := openRegular(name)
	if err != nil {
		return failed(err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return failed(err)
	}
	if info.Size() > maxIndexFile {
		return failed(fmt.Errorf("it has %d bytes, at most %d are read", info.Size(), maxIndexFile))
	}
	raw, err := io.ReadAll(io.LimitReader(f, maxIndexFile))
	if err != nil {
		return failed(err)
	}
	x, err := index.Open(raw)
	if err == nil {
		err = x.Verify()
	}
	if err != nil {
		return failed(err)
	}
	return x, nil
}

// indexStores opens the stores that the flags and the environment name for the
// chunks of an index in a file, which says of none itself.
func (f *readFlags) indexStores(x *index.Index) (list []chunkstore.Store, done func(), err error) {
	done = func() {
		for _, s := range list {
			if c, ok := s.(io.Closer); ok {
				c.Close()
			}
		}
	}
	addresses := f.stores
	if len(addresses) == 0 {
		addresses = stores.Split(cmp.Or(f.getenv(envBlobStore), f.getenv(envStore)))
	}
	if len(addresses) == 0 {
		return nil, done, usagef("name the store of the chunks with --store: %s", stores.LooseForms())
	}
	for _, a := range addresses {
		if err := checkStore(a); err != nil {
			return nil, done, err
		}
		if !stores.Loose(a) {
			return nil, done, usagef("--store %s: packs are for images; an index in a file needs a store of single chunks: %s", a, stores.LooseForms())
		}
	}
	if addresses, err = absStores(addresses); err != nil {
		return nil, done, err
	}
	for _, a := range addresses {
		s, err := stores.Open(a, stores.Source{Index: x, Access: f.access()})
		if err != nil {
			done()
			return nil, done, &convert.Error{Part: convert.Source, Err: err}
		}
		list = append(list, s)
	}
	return list, done, nil
}
