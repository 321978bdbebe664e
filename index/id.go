// Package index reads and writes the list of the chunks that make up a root
// image.
//
// An index is a casync .caibx file, so that casync can put an image together
// from a loose store and this index. [Open] works on the file's bytes, mapped
// or read: nothing is parsed in advance, and an image of a million chunks
// opens as fast as an empty one. Ask [Index.Find] which chunk holds a byte and
// [Index.At] for the chunk. Nothing in a damaged or hostile index makes them
// panic or hand out a chunk of another size than declared.
package index

import (
	"crypto/sha256"
	"crypto/sha512"
	"encoding/hex"
	"fmt"
)

// ID names a chunk: the digest of its plain bytes.
type ID [32]byte

// String returns the ID as 64 lower-case hex digits.
func (id ID) String() string { return hex.EncodeToString(id[:]) }

// ParseID reads what String wrote.
func ParseID(s string) (ID, error) {
	var id ID
	if len(s) != hex.EncodedLen(len(id)) {
		return ID{}, fmt.Errorf("chunk id %.80q: got %d characters, want %d hex digits", s, len(s), hex.EncodedLen(len(id)))
	}
	if _, err := hex.Decode(id[:], []byte(s)); err != nil {
		return ID{}, fmt.Errorf("chunk id %q: %w", s, err)
	}
	return id, nil
}

// Digest is the hash function that names an index's chunks.
type Digest uint8

const (
	// SHA256 is what bootfs writes: an OCI digest names the same bytes.
	SHA256 Digest = iota
	// SHA512_256 is casync's default; bootfs reads it.
	SHA512_256
)

// String returns the name that casync's --digest takes.
func (d Digest) String() string {
	if d == SHA512_256 {
		return "sha512-256"
	}
	return "sha256"
}

// Sum names the chunk whose plain bytes are p.
func (d Digest) Sum(p []byte) ID {
	if d == SHA512_256 {
		return sha512.Sum512_256(p)
	}
	return sha256.Sum256(p)
}
