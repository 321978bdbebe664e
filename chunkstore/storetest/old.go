package storetest

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/container-bootfs/bootfs/chunkstore"
	"github.com/container-bootfs/bootfs/index"
)

// FillWithOld puts n bytes of chunks, each of size bytes, that nobody has used for
// a day into the cache in dir, and returns their files.
func FillWithOld(t *testing.T, dir string, n, size int64) (files []string) {
	t.Helper()
	yesterday := time.Now().Add(-24 * time.Hour)
	for ; n >= size; n -= size {
		shard, name := chunkstore.Place(index.SHA256.Sum([]byte(fmt.Sprint("old ", n))))
		file := filepath.Join(dir, shard, name)
		err := os.MkdirAll(filepath.Dir(file), 0o755)
		if err == nil {
			err = os.WriteFile(file, nil, 0o644)
		}
		if err == nil {
			err = os.Truncate(file, size)
		}
		if err == nil {
			err = os.Chtimes(file, yesterday, yesterday)
		}
		if err != nil {
			t.Fatal(err)
		}
		files = append(files, file)
	}
	return files
}
