package convcache

import (
	"encoding/binary"
	"maps"
	"slices"
	"sync"

	"github.com/container-bootfs/bootfs/internal/erofs"
)

// Image is what records say of an image with certain layers. Its methods may
// be called concurrently.
type Image struct {
	layers  []string         // DiffIDs, bottom first
	number  map[string]int32 // the lowest layer with a DiffID
	records map[string]*Record
	chunks  map[string][]Chunk // by key of the unit

	places func() map[[2]int32]place // by layer and entry
}

// place says where a file stands in a unit.
type place struct {
	chunks []Chunk // of the unit
	offset int64   // in the unit, bytes
}

// NewImage joins records, by DiffID, for an image of layers with these DiffIDs,
// the lowest first. One that is not known is "".
func NewImage(diffIDs []string, records map[string]*Record) *Image {
	i := &Image{layers: diffIDs, number: make(map[string]int32), records: records, chunks: make(map[string][]Chunk)}
	for n, id := range slices.Backward(diffIDs) {
		i.number[id] = int32(n)
	}
	delete(i.number, "")
	for _, r := range records {
		for _, u := range r.Units {
			if files, ok := i.of(r.Layers, u.Files); ok {
				i.chunks[key(files)] = u.Chunks
			}
		}
	}
	i.places = sync.OnceValue(i.findFiles)
	return i
}

// findFiles looks for files also where their neighbours are of other images.
func (i *Image) findFiles() map[[2]int32]place {
	out := make(map[[2]int32]place)
	for _, id := range slices.Sorted(maps.Keys(i.records)) {
		r := i.records[id]
		for _, u := range r.Units {
			var offset int64
			for _, f := range u.Files {
				if n, ok := i.number[r.Layers[f.Layer]]; ok {
					at := [2]int32{n, f.Entry}
					if _, ok := out[at]; !ok { // the first unit is of the latest image
						out[at] = place{u.Chunks, offset}
					}
				}
				offset += int64(f.Blocks) * erofs.BlockSize
			}
		}
	}
	return out
}

// key names a unit by its files. Where two layers are the same, files counts
// the lower one.
func key(files []File) string {
	b := make([]byte, 0, 6*len(files))
	for _, f := range files {
		b = binary.AppendUvarint(b, uint64(f.Layer))
		b = binary.AppendUvarint(b, uint64(f.Entry))
		b = binary.AppendUvarint(b, uint64(f.Blocks))
	}
	return string(b)
}

// lowest replaces each layer by the lowest with the same DiffID. It reports
// whether all are known.
func (i *Image) lowest(files []File) bool {
	for k := range files {
		n, ok := i.number[i.layers[files[k].Layer]]
		if !ok {
			return false
		}
		files[k].Layer = n
	}
	return true
}

// Chunks returns the chunks of the unit with these files, nil if they are not
// known. It may change files.
func (i *Image) Chunks(files []File) []Chunk {
	if len(files) == 0 || !i.lowest(files) {
		return nil
	}
	return i.chunks[key(files)]
}

// Find returns the chunks of a unit that has the file, and the file's offset
// in it, in bytes; nil if none is known.
func (i *Image) Find(layer, entry int32) (chunks []Chunk, offset int64) {
	n, ok := i.number[i.layers[layer]]
	if !ok {
		return nil, 0
	}
	p := i.places()[[2]int32{n, entry}]
	return p.chunks, p.offset
}

// keptUnits is how many units that the image does not have stay in a record
// that has fewer of the image's: other images with the layer may have them.
const keptUnits = 256

// Records returns the records for the next conversion: the image's units, and
// of those that it was made with no more than there are of the image. entries
// are those of the layers that were read, by DiffID. It may change units.
func (i *Image) Records(entries map[string][]byte, units []Unit) map[string]*Record {
	out := make(map[string]*Record)
	for id := range i.number {
		switch old := i.records[id]; {
		case entries[id] != nil:
			out[id] = &Record{Entries: entries[id], Layers: []string{id}}
		case old != nil:
			out[id] = &Record{Entries: old.Entries, Layers: []string{id}}
		}
	}
	used := make(map[string]bool)
	for _, u := range units {
		if len(u.Files) == 0 || !i.lowest(u.Files) {
			continue
		}
		used[key(u.Files)] = true
		// Each of the layers knows the unit: one of the others may be replaced,
		// and the files of this one are still found.
		for k, f := range u.Files {
			r := out[i.layers[f.Layer]]
			if r != nil && !slices.ContainsFunc(u.Files[:k], func(g File) bool { return g.Layer == f.Layer }) {
				r.add(i.layers, u)
			}
		}
	}
	for id, r := range out {
		old := i.records[id]
		if old == nil {
			continue
		}
		left := max(len(r.Units), keptUnits)
		for _, u := range old.Units {
			if left == 0 {
				break
			}
			if files, ok := i.of(old.Layers, u.Files); ok && used[key(files)] {
				continue
			}
			r.add(old.Layers, u)
			left--
		}
	}
	return out
}

// of returns files, of layers, as files of the image.
func (i *Image) of(layers []string, files []File) ([]File, bool) {
	out := make([]File, len(files))
	for k, f := range files {
		n, ok := i.number[layers[f.Layer]]
		if !ok {
			return nil, false
		}
		out[k] = File{n, f.Entry, f.Blocks}
	}
	return out, true
}

// add adds a unit whose files are of layers.
func (r *Record) add(layers []string, u Unit) {
	files := make([]File, len(u.Files))
	for k, f := range u.Files {
		n := slices.Index(r.Layers, layers[f.Layer])
		if n < 0 {
			n = len(r.Layers)
			r.Layers = append(r.Layers, layers[f.Layer])
		}
		files[k] = File{int32(n), f.Entry, f.Blocks}
	}
	r.Units = append(r.Units, Unit{files, u.Chunks})
}
