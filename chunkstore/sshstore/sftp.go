package sshstore

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"sync"
	"sync/atomic"
	"time"

	"github.com/pkg/sftp"
	"golang.org/x/sync/errgroup"

	"github.com/container-bootfs/bootfs/chunkstore"
	"github.com/container-bootfs/bootfs/index"
)

const (
	// tempPrefix starts the name of a chunk that is being written. casync and
	// desync pass over hidden files and over those without suffix.
	tempPrefix = ".tmp-"
	// listAtOnce is how many subdirectories are read at a time.
	listAtOnce = 16

	extFsync       = "fsync@openssh.com"
	extPosixRename = "posix-rename@openssh.com"
)

// files is the SFTP of a server.
type files struct {
	*sftp.Client
	answered atomic.Int64 // when an operation last ended, Unix nanoseconds
	baseSeen atomic.Bool  // the store's directory is there
}

// noSFTPError says that the server has no SFTP.
type noSFTPError struct{ why error }

func (e noSFTPError) Error() string { return fmt.Sprintf("the server has no SFTP (%v)", e.why) }

func (e noSFTPError) Unwrap() error { return permanent(e.why) }

// startSFTP opens the server's SFTP subsystem.
func startSFTP(c *conn) (*files, error) {
	fail := func(err error) (*files, error) {
		var no noCasyncError
		if err = c.noCasync(err); errors.As(err, &no) {
			err = noSFTPError{errors.New(no.why.Error())}
		}
		return nil, err
	}
	s, err := c.client.NewSession()
	if err != nil {
		return fail(err)
	}
	late := time.AfterFunc(helloPatience, func() {
		c.end(fmt.Errorf("SFTP on the server did not answer within %v", helloPatience))
	})
	defer late.Stop()
	in, err := s.StdinPipe()
	var out io.Reader
	if err == nil {
		out, err = s.StdoutPipe()
	}
	if err == nil {
		err = s.RequestSubsystem("sftp")
	}
	var client *sftp.Client
	if err == nil {
		client, err = sftp.NewClientPipe(out, in, sftp.UseConcurrentWrites(true))
	}
	if err != nil {
		s.Close()
		return fail(err)
	}
	return &files{Client: client}, nil
}

// onFiles runs op on the server's SFTP. When ctx ends first, op goes on, as
// SFTP cannot take a request back; drop then gets its result.
func onFiles[T any](ctx context.Context, c *conn, op func(*files) (T, error), drop func(T)) (T, error) {
	var none T
	c.mu.Lock()
	if c.sftp == nil {
		c.sftp = begin(func() (*files, error) { return startSFTP(c) })
	}
	u := c.sftp
	c.mu.Unlock()
	client, err := u.wait(ctx)
	if err != nil {
		return none, err
	}
	start := time.Now()
	running := begin(func() (T, error) {
		v, err := op(client)
		client.answered.Store(time.Now().UnixNano())
		return v, err
	})
	v, err := running.wait(ctx)
	if err == nil || running.finished() && errors.Is(err, running.err) {
		return v, err
	}
	go func() {
		if <-running.done; running.err == nil {
			drop(running.value)
		}
	}()
	// A server that hangs in one request, on a pipe for example, answers no
	// other either.
	if last := time.Unix(0, client.answered.Load()); time.Since(start) >= stuckAfter && time.Since(last) >= stuckAfter {
		c.end(fmt.Errorf("SFTP on the server answered nothing for %v", time.Since(start).Round(time.Second)))
	}
	return none, err
}

func nothing[T any](T) {}

// read reads a chunk by SFTP.
func (c *conn) read(ctx context.Context, id index.ID) (*frame, error) {
	shard, file := chunkstore.Place(id)
	name := path.Join(c.store.address.dir, shard, file)
	return onFiles(ctx, c, func(client *files) (*frame, error) {
		f, err := client.readFile(ctx, c.store, name)
		return f, client.explain(c.store, err)
	}, (*frame).release)
}

// readFile reads a file in two round trips: how long it is, is asked together
// with opening it, and checked together with reading it.
func (c *files) readFile(ctx context.Context, s *Store, name string) (*frame, error) {
	before := begin(func() (fs.FileInfo, error) { return c.Stat(name) })
	f, err := c.Open(name)
	<-before.done
	if err == nil {
		defer func() { go f.Close() }()
		err = before.err
	}
	if err != nil {
		return nil, err
	}
	info := before.value
	for range 3 {
		if err := checkFile(info); err != nil {
			return nil, err
		}
		stored, err := s.newFrame(ctx, int(info.Size()))
		if err != nil {
			return nil, err
		}
		opened := begin(f.Stat)
		n, err := f.ReadAt(stored.b, 0)
		if <-opened.done; err == nil {
			err = opened.err
		}
		if err == nil && opened.value.Size() == info.Size() {
			return stored, nil
		}
		stored.release()
		switch {
		case opened.err == nil && opened.value.Size() != info.Size():
			info = opened.value // replaced between the two, or growing
		case errors.Is(err, io.EOF):
			return nil, fmt.Errorf("got %d bytes, want %d: %w", n, info.Size(), io.ErrUnexpectedEOF)
		default:
			return nil, err
		}
	}
	return nil, errors.New("the file does not stay the same")
}

// errNoChunk is wrapped when something stands in a chunk's place that cannot be
// one.
var errNoChunk = errors.New("not a stored chunk")

func checkFile(info fs.FileInfo) error {
	if !info.Mode().IsRegular() {
		return permanent(fmt.Errorf("%w: got file type %v, want a regular file", errNoChunk, info.Mode().Type()))
	}
	if info.Size() < 1 || info.Size() > chunkstore.MaxStored {
		return permanent(fmt.Errorf("%w: got %d bytes, want 1 to %d", errNoChunk, info.Size(), chunkstore.MaxStored))
	}
	return nil
}

// explain makes of a file that is not there a chunk that is not there, and says
// so when the whole store is not.
func (c *files) explain(s *Store, err error) error {
	if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if !c.baseSeen.Load() {
		if _, err := c.Stat(s.address.dir); err != nil {
			return fmt.Errorf("%w: %s on the server: %w", chunkstore.ErrNotFound, s.address.dir, err)
		}
		c.baseSeen.Store(true)
	}
	return chunkstore.ErrNotFound
}

// stat reports by SFTP whether there is a file that may be chunk id.
func (c *conn) stat(ctx context.Context, id index.ID) (bool, error) {
	shard, file := chunkstore.Place(id)
	return onFiles(ctx, c, func(client *files) (bool, error) {
		info, err := client.Stat(path.Join(c.store.address.dir, shard, file))
		if err != nil {
			return false, client.explain(c.store, err)
		}
		return checkFile(info) == nil, nil
	}, nothing)
}

// put writes a chunk by SFTP.
func (c *conn) put(ctx context.Context, id index.ID, frame []byte) error {
	shard, file := chunkstore.Place(id)
	dir := path.Join(c.store.address.dir, shard)
	_, err := onFiles(ctx, c, func(client *files) (struct{}, error) {
		for _, ext := range []string{extFsync, extPosixRename} {
			if _, ok := client.HasExtension(ext); !ok {
				return struct{}{}, permanent(fmt.Errorf("the server's SFTP has no %s, without which a chunk cannot be stored safely", ext))
			}
		}
		return struct{}{}, client.writeFile(ctx, dir, file, frame)
	}, nothing)
	return err
}

func (c *files) writeFile(ctx context.Context, dir, file string, frame []byte) error {
	temp := path.Join(dir, tempPrefix+rand.Text())
	f, made, err := c.createTemp(dir, temp)
	if err != nil {
		return err
	}
	_, err = f.Write(frame)
	if err == nil {
		// Before the rename: otherwise a power cut may leave the chunk's name
		// with no bytes behind it.
		err = f.Sync()
	}
	go f.Close() // its answer says nothing that matters after that of fsync
	if err == nil {
		err = ctx.Err() // the caller counts on nothing being there
	}
	if err == nil {
		err = c.PosixRename(temp, path.Join(dir, file))
	}
	if err != nil {
		c.Remove(temp)
		return err
	}
	// Until the directories are on disk, the chunk has no name there.
	var g errgroup.Group
	if made {
		g.Go(func() error { return c.syncDir(path.Dir(dir)) })
	}
	g.Go(func() error { return c.syncDir(dir) })
	return g.Wait()
}

// createTemp makes the file temp in dir. made says that it made dir too.
func (c *files) createTemp(dir, temp string) (f *sftp.File, made bool, err error) {
	const tries = 16
	for range tries {
		f, err = c.OpenFile(temp, os.O_WRONLY|os.O_CREATE|os.O_EXCL)
		// casync gc removes a subdirectory that it finds empty. That may happen
		// after it was made and before a file is in it.
		if !errors.Is(err, fs.ErrNotExist) {
			return f, made, err
		}
		made = true
		// Mostly the store is there already, and only the subdirectory is not.
		if err = c.Mkdir(dir); errors.Is(err, fs.ErrNotExist) {
			err = c.MkdirAll(dir)
		}
		if err != nil {
			if _, serr := c.Stat(dir); serr != nil { // nor did somebody else make it
				return nil, false, err
			}
		}
	}
	return nil, false, err
}

// syncDir makes the names in a directory durable, on servers that can: the
// protocol opens only files, but OpenSSH's server takes a directory.
func (c *files) syncDir(dir string) error {
	f, err := c.Open(dir)
	if err == nil {
		err = f.Sync()
		go f.Close()
	}
	var status *sftp.StatusError
	if errors.As(err, &status) || errors.Is(err, fs.ErrPermission) {
		return nil
	}
	// Somebody has removed the chunk again, and the directory with it.
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// remove removes a chunk by SFTP, and its subdirectory with the last file in it.
func (c *conn) remove(ctx context.Context, id index.ID) error {
	shard, file := chunkstore.Place(id)
	dir := path.Join(c.store.address.dir, shard)
	_, err := onFiles(ctx, c, func(client *files) (struct{}, error) {
		err := client.Remove(path.Join(dir, file))
		if err == nil {
			client.RemoveDirectory(dir) // fails while there are other files
		}
		return struct{}{}, err
	}, nothing)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// list gives yield the chunks that are there, until it returns false.
func (c *conn) list(ctx context.Context, yield func(chunkstore.Entry) bool) error {
	return c.walk(ctx, func(shard string, files []fs.FileInfo) bool {
		for _, file := range files {
			id, ok := chunkstore.AtPlace(shard, file.Name())
			if ok && checkFile(file) == nil && !yield(chunkstore.Entry{ID: id, Size: file.Size(), Modified: file.ModTime()}) {
				return false
			}
		}
		return true
	})
}

// walk gives yield the subdirectories and what is in them, until it returns
// false.
func (c *conn) walk(ctx context.Context, yield func(shard string, files []fs.FileInfo) bool) error {
	shards, err := c.files(ctx, c.store.address.dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // no chunk was written yet
	}
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	type result struct {
		shard string
		files []fs.FileInfo
		err   error
	}
	var (
		results = make(chan result)
		work    = make(chan string)
		readers sync.WaitGroup
	)
	go func() {
		defer close(work)
		for _, shard := range shards {
			if !chunkstore.IsShard(shard.Name()) {
				continue
			}
			select {
			case work <- shard.Name():
			case <-ctx.Done():
				return
			}
		}
	}()
	for range listAtOnce {
		readers.Go(func() {
			for shard := range work {
				files, err := c.shardFiles(ctx, shard)
				results <- result{shard, files, err}
			}
		})
	}
	go func() { readers.Wait(); close(results) }()
	stopped := false
	for r := range results {
		if r.err != nil && err == nil && !stopped {
			err = r.err
			cancel()
		}
		if err == nil && !stopped && !yield(r.shard, r.files) {
			stopped = true
			cancel()
		}
	}
	if err == nil && !stopped {
		err = ctx.Err()
	}
	return err
}

// shardFiles returns what is in a subdirectory.
func (c *conn) shardFiles(ctx context.Context, shard string) ([]fs.FileInfo, error) {
	files, err := c.files(ctx, path.Join(c.store.address.dir, shard))
	if err != nil {
		var status *sftp.StatusError
		if errors.Is(err, fs.ErrNotExist) || errors.As(err, &status) {
			return nil, nil // removed meanwhile, or none of ours
		}
		return nil, err
	}
	return files, nil
}

// files returns what is in a directory.
func (c *conn) files(ctx context.Context, dir string) ([]fs.FileInfo, error) {
	return onFiles(ctx, c, func(client *files) ([]fs.FileInfo, error) { return client.ReadDirContext(ctx, dir) }, nothing)
}
