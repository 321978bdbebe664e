package chunkstore

import (
	"strings"

	"github.com/container-bootfs/bootfs/index"
)

// The layout of a loose store, which is casync's and desync's: chunk abcd… is
// the file abcd/abcd….cacnk.
const (
	Suffix   = ".cacnk"
	ShardLen = 4 // hex digits that name a chunk's subdirectory
)

// Place returns the subdirectory and the file name of a chunk.
func Place(id index.ID) (shard, file string) {
	name := id.String()
	return name[:ShardLen], name + Suffix
}

// AtPlace is the reverse of Place; ok is false for a file that is no chunk.
func AtPlace(shard, file string) (id index.ID, ok bool) {
	digits, ok := strings.CutSuffix(file, Suffix)
	if !ok {
		return id, false
	}
	id, err := index.ParseID(digits)
	return id, err == nil && digits == id.String() && digits[:ShardLen] == shard
}

// IsShard reports whether a subdirectory of that name has chunks.
func IsShard(name string) bool {
	return len(name) == ShardLen && strings.Trim(name, "0123456789abcdef") == ""
}
