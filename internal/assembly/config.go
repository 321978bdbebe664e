package assembly

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/container-bootfs/bootfs/internal/bootimage"
)

// object is a JSON object of which most is passed on unread: engines know
// fields that this program does not. As in their decoder, the case of a name
// does not matter.
type object map[string]json.RawMessage

func parseObject(what string, raw []byte) (object, error) {
	var o object
	if len(raw) > 0 {
		if err := json.Unmarshal(raw, &o); err != nil {
			return nil, fmt.Errorf("%s: %w", what, err)
		}
	}
	if o == nil { // null
		o = object{}
	}
	return o, nil
}

func (o object) get(name string) json.RawMessage {
	if v, ok := o[name]; ok {
		return v
	}
	// Where several differ in case alone, the choice must not be the map's.
	for _, k := range slices.Sorted(maps.Keys(o)) {
		if strings.EqualFold(k, name) {
			return o[k]
		}
	}
	return nil
}

func (o object) set(name string, v any) error {
	raw, err := json.Marshal(v)
	if err != nil {
		return err
	}
	for k := range o {
		if strings.EqualFold(k, name) {
			delete(o, k)
		}
	}
	o[name] = raw
	return nil
}

// bootConfig makes the boot image's configuration of the source's: boot comes
// before the entrypoint, its volume is added, and history and layers are those
// of the boot image.
func bootConfig(raw []byte, source *v1.ConfigFile, layers []*imageLayer) ([]byte, error) {
	top, err := parseObject("configuration", raw)
	if err != nil {
		return nil, err
	}
	config, err := parseObject("configuration: config", top.get("config"))
	if err != nil {
		return nil, err
	}
	volumes, err := parseObject("configuration: Volumes", config.get("Volumes"))
	if err != nil {
		return nil, err
	}
	volumes[bootimage.WritablePath] = json.RawMessage("{}")

	history := []object{}
	if h := top.get("history"); len(h) > 0 {
		if err := json.Unmarshal(h, &history); err != nil {
			return nil, fmt.Errorf("configuration: history: %w", err)
		}
	}
	for i := range history {
		if history[i] == nil { // null
			history[i] = object{}
		}
		if err := history[i].set("empty_layer", true); err != nil {
			return nil, err
		}
	}
	for _, comment := range []string{
		"boot: mounts the root filesystem of the source image, whose steps are listed before",
		"index and metadata of that filesystem",
	} {
		h := object{}
		if created := top.get("created"); created != nil {
			h["created"] = created
		}
		if err := h.set("created_by", "bootfs-convert"); err != nil {
			return nil, err
		}
		if err := h.set("comment", comment); err != nil {
			return nil, err
		}
		history = append(history, h)
	}
	rootFS := v1.RootFS{Type: "layers"}
	for _, l := range layers {
		rootFS.DiffIDs = append(rootFS.DiffIDs, l.diffID)
	}
	for _, s := range []struct {
		in   object
		name string
		v    any
	}{
		{config, "Entrypoint", append([]string{bootimage.BootPath}, source.Config.Entrypoint...)},
		{config, "Volumes", volumes},
		{top, "config", config},
		{top, "history", history},
		{top, "rootfs", rootFS},
	} {
		if err := s.in.set(s.name, s.v); err != nil {
			return nil, err
		}
	}
	return json.Marshal(top)
}
