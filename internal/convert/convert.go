// Package convert turns an image into one that starts before it is
// downloaded: a small boot image, and chunks that lie beside it or in a store
// of their own.
//
// [Run] is the whole way. The layers are read in parallel and merged, the
// merged tree is laid out as a root image, and that is read once from front to
// back: cut, named, encoded in parallel and put away in order. The root image
// is never stored whole. Where an earlier image has most of the chunks, they
// are named first, and only what its packs lack is read again and encoded. What
// Run writes depends on the source, the options, the boot binary and the base,
// not on the machine; and the destination shows the new image complete or is
// what it was.
package convert

import (
	"errors"

	"github.com/container-bootfs/bootfs/internal/transport"
)

// Part is one of the places that a conversion works with.
type Part int

// The parts that errors of Run are told apart by.
const (
	Source      Part = iota + 1 // the image that is read
	Destination                 // the image or the store that is written
	Usage                       // options that do not fit one another
)

// Error says which part of a conversion failed, for a caller that answers them
// differently.
type Error struct {
	Part Part
	Err  error
}

func (e *Error) Error() string { return e.Err.Error() }
func (e *Error) Unwrap() error { return e.Err }

// in marks err as one of part, unless it says itself of which it is.
func in(part Part, err error) error {
	var e *Error
	if err == nil || errors.As(err, &e) {
		return err
	}
	if errors.As(err, new(*transport.SourceError)) {
		part = Source
	}
	return &Error{part, err}
}

// Phase is a stretch of a conversion that progress is told of.
type Phase string

// The phases of a conversion. Those of platforms follow one another, and
// uploading goes on beside them.
const (
	PhaseSource Phase = "source" // bytes of a source that is spooled before it is read
	PhaseLayers Phase = "layers" // stored bytes of a platform's layers
	PhaseNames  Phase = "names"  // plain bytes of a platform's root image, where a base may have its chunks
	PhaseChunks Phase = "chunks" // plain bytes of a platform's root image, as far as they are stored anew
	PhaseUpload Phase = "upload" // bytes that go to the destination and the store
)

// Event is a step of progress.
type Event struct {
	Platform string // "" in phases that are not of one
	Phase    Phase
	Done     int64 // bytes
	Total    int64 // bytes; 0 when it is not known
	End      bool  // the phase is over
}

// Report is what a conversion did, for people and CI.
type Report struct {
	Source      string           `json:"source"`
	Destination string           `json:"destination"`
	Digest      string           `json:"digest"` // of what the destination's name now stands for
	Store       string           `json:"store"`  // where the chunks are; "" beside the image in a layout
	Platforms   []PlatformReport `json:"platforms"`
	Skipped     []string         `json:"skipped,omitempty"` // what else the source holds, and why it was left
	// What signs or describes the source and came along, as digests.
	Attestations []string `json:"attestations,omitempty"` // manifests of its index
	Signatures   []string `json:"signatures,omitempty"`   // cosign's and OCI referrers
	TempBytes    int64    `json:"tempBytes"`              // estimate of the temporary space that was asked for
	Seconds      float64  `json:"seconds"`
}

// PlatformReport is the part of one platform.
type PlatformReport struct {
	Platform     string `json:"platform"`
	SourceDigest string `json:"sourceDigest"`
	SourceBytes  int64  `json:"sourceBytes"`  // of the layers as stored
	CachedLayers int    `json:"cachedLayers"` // layers that a cache knew and that were not read
	CachedBytes  int64  `json:"cachedBytes"`  // of SourceBytes, those of CachedLayers
	IndexDigest  string `json:"indexDigest"`  // names the root
	Files        int64  `json:"files"`        // inodes
	RootBytes    int64  `json:"rootBytes"`    // of the root image
	Chunks       int    `json:"chunks"`       // of the index
	ZeroChunks   int    `json:"zeroChunks"`   // of them, all zeros
	Distinct     int    `json:"distinctChunks"`
	StoredBytes  int64  `json:"storedBytes"` // of the distinct chunks, compressed

	// What was written: packs, or chunks of a loose store, that the place did
	// not have. The three below are its parts where there are packs.
	NewBytes       int64 `json:"newBytes"`
	NewChunkBytes  int64 `json:"newChunkBytes"`  // chunks that the base has in no pack
	StartPackBytes int64 `json:"startPackBytes"` // packs of the start set
	RewrittenBytes int64 `json:"rewrittenBytes"` // chunks of packs of the base that are given up
	ReusedBytes    int64 `json:"reusedBytes"`    // packs or chunks that were there, or that the registry has linked
	CopiedBytes    int64 `json:"copiedBytes"`    // packs of the base that were brought from its place

	Base        string `json:"base,omitempty"` // boot manifest of the image whose packs were looked at for reuse
	Packs       int    `json:"packs"`
	BasePacks   int    `json:"basePacks"`   // of Packs, those of the base
	UnusedBytes int64  `json:"unusedBytes"` // of the packs, chunks that this image does not have or has twice
	StartChunks int    `json:"startChunks"`
	StartBytes  int64  `json:"startBytes"` // stored bytes of the start set
	BootDigest  string `json:"bootDigest"` // manifest of the boot image
	BootBytes   int64  `json:"bootBytes"`  // what an engine pulls, compressed

	NameSeconds  float64 `json:"nameSeconds"` // of cutting and naming ahead of ChunkSeconds, where there is a base
	LayerSeconds float64 `json:"layerSeconds"`
	MergeSeconds float64 `json:"mergeSeconds"`
	ChunkSeconds float64 `json:"chunkSeconds"`
	ImageSeconds float64 `json:"imageSeconds"`
}
