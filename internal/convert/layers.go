package convert

import (
	"context"
	"fmt"
	"log/slog"

	"golang.org/x/sync/errgroup"

	"github.com/container-bootfs/bootfs/internal/layer"
	"github.com/container-bootfs/bootfs/internal/scratch"
)

// expansion is what a compressed layer is taken to grow by when it is spooled.
// Layers of distributions grow 2.5 to 3.5 times.
const expansion = 3

// CheckSpace says how much temporary space reading layers and other bytes of
// temporary files will take, by experience, and looks whether it is there. What
// cannot fit is refused, what may not is a warning: how far a layer expands
// shows only when it is read.
func CheckSpace(dir string, layers []layer.Blob, other int64, log *slog.Logger) (estimate int64, err error) {
	least := other
	estimate = other
	for _, b := range layers {
		if b.Plain == nil && b.Size > 0 {
			least += b.Size
			estimate += expansion * b.Size
		}
	}
	if estimate == 0 {
		return 0, nil
	}
	log.Info(fmt.Sprintf("temporary files: about %s in %s", scratch.Bytes(estimate), dir))
	if err := scratch.Check(dir, least); err != nil {
		return estimate, err
	}
	if err := scratch.Check(dir, estimate); err != nil {
		log.Warn("this may fail: " + err.Error())
	}
	return estimate, nil
}

// layersAtOnce is how many layers are fetched and decompressed at a time.
// Registries answer that many requests of one client without complaint.
const layersAtOnce = 4

// ReadLayers reads the layers of an image in parallel, bottom first. done
// frees what they hold.
func ReadLayers(ctx context.Context, blobs []layer.Blob, tempDir string, progress func(int64)) (_ []*layer.Layer, done func(), err error) {
	layers := make([]*layer.Layer, len(blobs))
	done = func() {
		for _, l := range layers {
			if l != nil {
				l.Close()
			}
		}
	}
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(layersAtOnce)
	for i, b := range blobs {
		g.Go(func() (err error) {
			layers[i], err = layer.Read(ctx, b, layer.Options{TempDir: tempDir, Progress: progress})
			return err
		})
	}
	if err := g.Wait(); err != nil {
		done()
		return nil, nil, in(Source, scratch.Explain(tempDir, err))
	}
	return layers, done, nil
}
