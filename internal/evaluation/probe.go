package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// probe is what this program does inside of a container, or of any other mount:
// a task, with the seconds that it took printed.
//
//	probe TASK PATH
func probe(task, path string) error {
	do, ok := tasks[task]
	if !ok {
		return fmt.Errorf("probe: there is no task %q", task)
	}
	began := time.Now()
	if err := do(path); err != nil {
		return err
	}
	_, err := fmt.Println(time.Since(began).Seconds())
	return err
}

// randomReads is how often the task random reads 4 KiB.
const randomReads = 20000

var tasks = map[string]func(path string) error{
	"stat": func(path string) error {
		return walk(path, func(name string, _ fs.DirEntry) error {
			_, err := os.Lstat(name)
			return err
		})
	},
	"readdir": func(path string) error {
		return walk(path, func(string, fs.DirEntry) error { return nil })
	},
	"ls-lR": func(path string) error {
		return exec.Command("ls", "-lR", path).Run()
	},
	"read": func(path string) error {
		return walk(path, func(name string, d fs.DirEntry) error {
			if !d.Type().IsRegular() {
				return nil
			}
			return readFile(name)
		})
	},
	"sequential": readFile,
	"random": func(path string) error {
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		defer f.Close()
		info, err := f.Stat()
		if err != nil {
			return err
		}
		if err := unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_RANDOM); err != nil {
			return err
		}
		rng := rand.New(rand.NewPCG(1, 2))
		buf := make([]byte, 4096)
		for range randomReads {
			if _, err := f.ReadAt(buf, rng.Int64N(info.Size()/4096)*4096); err != nil {
				return err
			}
		}
		return nil
	},
}

// walk visits what lies below path on the same file system, in the order of the
// directories.
func walk(path string, visit func(name string, d fs.DirEntry) error) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	entries, err := f.ReadDir(-1)
	if err := errors.Join(err, f.Close()); err != nil {
		return err
	}
	for _, d := range entries {
		name := filepath.Join(path, d.Name())
		if err := visit(name, d); err != nil {
			return err
		}
		if d.IsDir() {
			if err := walk(name, visit); err != nil {
				return err
			}
		}
	}
	return nil
}

func readFile(name string) error {
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{f}, make([]byte, 128<<10))
	return err
}
