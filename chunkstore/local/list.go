package local

import (
	"context"
	"fmt"
	"iter"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/container-bootfs/bootfs/chunkstore"
	"github.com/container-bootfs/bootfs/index"
)

// List yields every chunk. Files that are none are passed over.
func (s *Store) List(ctx context.Context) iter.Seq2[chunkstore.Entry, error] {
	return func(yield func(chunkstore.Entry, error) bool) {
		for e, err := range s.entries(ctx) {
			if err != nil {
				yield(chunkstore.Entry{}, fmt.Errorf("chunk store %s: list: %w", s.name, err))
				return
			}
			if !yield(e, nil) {
				return
			}
		}
	}
}

// entries yields every chunk, and stops after the first error.
func (s *Store) entries(ctx context.Context) iter.Seq2[chunkstore.Entry, error] {
	return func(yield func(chunkstore.Entry, error) bool) {
		var err error
		for shard, files := range s.shards(ctx, &err) {
			slices.Sort(files)
			for _, file := range files {
				name := strings.TrimSuffix(strings.TrimPrefix(file, tempPrefix), suffix)
				id, err := index.ParseID(name)
				if err != nil || name != id.String() || name[:shardLen] != shard {
					continue
				}
				names := places(id)
				first := slices.IndexFunc(names[:], func(place string) bool {
					_, ok := slices.BinarySearch(files, place)
					return ok
				})
				if first < 0 || names[first] != file {
					continue // another one is read
				}
				if st, err := s.stat(id); err == nil && !yield(chunkstore.Entry{ID: id, Size: st.Size, Modified: time.Unix(st.Mtim.Unix())}, nil) {
					return
				}
			}
		}
		if err != nil {
			yield(chunkstore.Entry{}, err)
		}
	}
}

// shards yields the subdirectories and the names in them, until an error, which
// is left in err.
func (s *Store) shards(ctx context.Context, err *error) iter.Seq2[string, []string] {
	return func(yield func(string, []string) bool) {
		shards, failed := s.names(".")
		for _, shard := range shards {
			if failed = ctx.Err(); failed != nil {
				break
			}
			if !chunkstore.IsShard(shard) {
				continue
			}
			var files []string
			files, failed = s.names(shard)
			if isAny(failed, unix.ENOENT, unix.ENOTDIR, unix.ELOOP) {
				failed = nil // removed meanwhile, or none of ours
				continue
			}
			if failed != nil {
				break
			}
			if !yield(shard, files) {
				return
			}
		}
		*err = failed
	}
}

// names lists a directory of the store, in no particular order.
func (s *Store) names(dir string) ([]string, error) {
	if s.err != nil {
		return nil, s.err
	}
	f, err := s.openDir(dir)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return f.Readdirnames(-1)
}
