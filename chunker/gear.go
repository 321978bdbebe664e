package chunker

import (
	"crypto/sha256"
	"encoding/binary"
	"sync"
)

// window is the number of bytes that the gear hash looks back on: each byte
// shifts the 64-bit hash by one, so the 65th last byte has left it.
const window = 64

// gearSeed is the seed of profile v1. It is one under which no run of a
// repeated byte is cut before Max: then padding and zeros become few chunks,
// all alike.
const gearSeed = "bootfs gear v1"

// gear returns the table of the gear hash: entry b is the first eight bytes,
// big endian, of the SHA-256 of gearSeed and b.
var gear = sync.OnceValue(func() *[256]uint64 {
	var table [256]uint64
	for b := range table {
		sum := sha256.Sum256(append([]byte(gearSeed), byte(b)))
		table[b] = binary.BigEndian.Uint64(sum[:])
	}
	return &table
})
