// Package bootimage is the format of what stands in a boot image: the paths
// below /.bootfs and the configuration that the boot binary reads there.
package bootimage

// Paths inside a boot image. All are absolute.
const (
	Dir           = "/.bootfs"
	BootPath      = Dir + "/boot"         // the binary
	LinkPath      = Dir + "/link"         // what stands at the executables of the source, one file with many names: it starts BootPath
	ConfigPath    = Dir + "/config.json"  // Config
	IndexPath     = Dir + "/rootfs.caibx" // package index
	LocatorsPath  = Dir + "/rootfs.packs" // package registrystore; absent when Stores are loose
	MetaPath      = Dir + "/rootfs.meta"  // package erofs: the front region of the root image
	CachePath     = Dir + "/rootfs.castr" // node cache mount point
	WritablePath  = Dir + "/rw"           // the volume of the writable layer
	LowerPath     = Dir + "/lower"        // mount point of the root image
	RootPath      = Dir + "/root"         // mount point of the writable root, before it becomes /
	TmpPath       = Dir + "/tmp"          // mount point of a tmpfs, where the volume cannot serve
	FillDir       = Dir + "/fill"         // state of a fill in place, while it is not complete
	FilledPath    = Dir + "/filled"       // names the index by which the root was filled; absent until it is complete
	StatusPath    = Dir + "/status.json"  // in a filled root, how the fill went
	SocketPath    = Dir + "/status"       // in a mounted root, for what the engine brings in: where boot tells how it is
	RecordPath    = Dir + "/start-set"    // below a mounted root, and for what the engine brings in a socket: what was read, as package reads has it
	CertsDir      = Dir + "/certs.d"      // how registries and web servers are reached, as containerd and docker have it
	SecretsDir    = Dir + "/secrets"      // credentials that are bootfs's own
	SecretsPrefix = "/run/secrets/bootfs" // the same, as Docker mounts secrets
)

// VolumeMark is a directory in each of Config.Marked. Engines initialise a
// volume with the image's content: one that has the mark is initialised only as
// far as the boot image goes.
const VolumeMark = ".bootfs-volume"

// DefaultPath is the PATH that engines set where an image has none.
const DefaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// Version is the format version of Config. A boot binary refuses any other.
const Version = 1

// MaxConfig is the size of the largest file at ConfigPath that is read, bytes.
const MaxConfig = 1 << 20

// Config is the content of ConfigPath, as JSON.
type Config struct {
	Version int    `json:"version"` // Version
	Profile string `json:"profile"` // cutting and layout parameters, "v1"

	// IndexDigest is the SHA-256 of the index, "sha256:…". It names every byte
	// of the root image, so it names the root.
	IndexDigest string `json:"indexDigest"`
	// Base is the digest of the boot manifest whose packs this image refers to
	// beside its own, or the image ID where the base had no manifest; "" when
	// all packs were made for this image.
	Base string `json:"base,omitempty"`
	// Stores are tried in order, as addresses: "registry://host/repo",
	// "/path". BLOB_STORE stands before them.
	Stores []string `json:"stores"`
	// HostKeys are the SSH host keys of Stores, as the converter found them:
	// lines of a known_hosts file, "host type base64".
	HostKeys []string `json:"hostKeys,omitempty"`
	// XattrClasses lists the classes of extended attributes that occur in the
	// root, sorted: "security", "system", "trusted", "user".
	XattrClasses []string `json:"xattrClasses,omitempty"`
	// Marked are the directories that hold VolumeMark, sorted: those of the boot
	// image that have more in the source.
	Marked []string `json:"marked,omitempty"`
	// Recorded says that the start set is what a start was seen to read.
	Recorded bool `json:"recorded,omitempty"`
	// Source is the image that was converted.
	Source Source `json:"source"`
}

// Source describes the source image as its configuration had it.
type Source struct {
	Name       string   `json:"name,omitempty"`   // as given to the converter, without credentials
	Digest     string   `json:"digest,omitempty"` // of its manifest
	Entrypoint []string `json:"entrypoint,omitempty"`
	Cmd        []string `json:"cmd,omitempty"`
	User       string   `json:"user,omitempty"`
	WorkingDir string   `json:"workingDir,omitempty"`
	Layers     []Layer  `json:"layers,omitempty"` // bottom first
}

// Layer is a layer of the source image.
type Layer struct {
	Digest    string `json:"digest,omitempty"`    // of the blob; "" where the source had no manifest
	DiffID    string `json:"diffID"`              // of the plain tar
	MediaType string `json:"mediaType,omitempty"` // of the blob
	Size      int64  `json:"size"`                // of the blob, bytes; -1 if unknown
	// Step is the entry of the image's history that made the layer, the first
	// being 1; 0 if the history does not tell.
	Step int `json:"step,omitempty"`
}
