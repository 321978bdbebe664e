package sshstore

import (
	"context"
	"crypto/rand"
	"errors"
	"io/fs"
	"path"
	"strings"
	"time"

	"github.com/container-bootfs/bootfs/chunkstore"
	"github.com/container-bootfs/bootfs/index"
)

// touch makes a chunk as young as one that is written now.
func (c *conn) touch(ctx context.Context, id index.ID) error {
	shard, file := chunkstore.Place(id)
	_, err := onFiles(ctx, c, func(client *files) (struct{}, error) {
		name, now := path.Join(c.store.address.dir, shard, file), time.Now()
		if err := client.Chtimes(name, now, now); err != nil {
			return struct{}{}, err
		}
		// A collector that looked at the old time may have taken the name away
		// while the new one was set, and removes the file.
		_, err := client.Lstat(name)
		return struct{}{}, err
	}, nothing)
	if errors.Is(err, fs.ErrNotExist) {
		return chunkstore.ErrNotFound
	}
	return err
}

// expire removes a chunk that was last modified before then.
func (c *conn) expire(ctx context.Context, id index.ID, then time.Time) (bool, error) {
	shard, file := chunkstore.Place(id)
	dir := path.Join(c.store.address.dir, shard)
	removed, err := onFiles(ctx, c, func(client *files) (bool, error) { return client.expireFile(dir, file, then) }, nothing)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return removed, err
}

// expireFile removes a file that was last modified before then. Somebody may
// touch it between the look at its time and its removal; so it loses its name
// first, and gets it back if it turns out to be young.
func (c *files) expireFile(dir, file string, then time.Time) (bool, error) {
	name, aside := path.Join(dir, file), path.Join(dir, tempPrefix+rand.Text())
	info, err := c.Stat(name)
	if err != nil || !info.ModTime().Before(then) {
		return false, err
	}
	if err := c.Rename(name, aside); err != nil {
		return false, err
	}
	if info, err = c.Stat(aside); err != nil {
		return false, err
	}
	if !info.ModTime().Before(then) {
		// It fails when a writer has put the chunk there anew.
		if err := c.Rename(aside, name); err == nil {
			return false, nil
		}
		return false, c.Remove(aside)
	}
	if err := c.Remove(aside); err != nil {
		return false, err
	}
	c.RemoveDirectory(dir) // fails while there are other files
	return true, nil
}

// sweep removes what killed writers have left, and tells swept of the bytes of
// each file.
func (c *conn) sweep(ctx context.Context, then time.Time, dry bool, swept func(int64)) error {
	var failed error
	err := c.walk(ctx, func(shard string, list []fs.FileInfo) bool {
		for _, file := range list {
			if !strings.HasPrefix(file.Name(), tempPrefix) || !file.Mode().IsRegular() || !file.ModTime().Before(then) {
				continue
			}
			if !dry {
				_, failed = onFiles(ctx, c, func(client *files) (struct{}, error) {
					return struct{}{}, client.Remove(path.Join(c.store.address.dir, shard, file.Name()))
				}, nothing)
				if errors.Is(failed, fs.ErrNotExist) {
					failed = nil
					continue
				}
			}
			if failed != nil {
				return false
			}
			swept(file.Size())
		}
		return true
	})
	return errors.Join(failed, err)
}
