package boot

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/moby/sys/mountinfo"

	"github.com/container-bootfs/bootfs/chunkstore/s3store"
	"github.com/container-bootfs/bootfs/chunkstore/sshstore"
	"github.com/container-bootfs/bootfs/internal/bootimage"
)

// maxSecret bounds what is read of a secret, in bytes.
const maxSecret = 1 << 20

// secretKind is what a secret is for, as its name tells.
type secretKind struct {
	names   []string // in a directory
	endings []string // of the names of single files
}

// The kinds of secrets. A single file whose name ends like none of them is a
// dockerConfig.
var (
	dockerConfig  = &secretKind{names: []string{"config.json", ".dockerconfigjson"}} // the second as Kubernetes mounts a pull secret
	sshKey        = &secretKind{[]string{"id_ed25519", "id_ecdsa", "id_rsa", "ssh-privatekey"}, []string{"_key", "id_ed25519", "id_ecdsa", "id_rsa"}}
	sshPassphrase = &secretKind{[]string{"passphrase"}, []string{"passphrase"}}
	sshPassword   = &secretKind{[]string{"password"}, []string{"password"}}
	sshKnownHosts = &secretKind{[]string{"known_hosts"}, []string{"known_hosts"}}
	sshAgent      = &secretKind{[]string{"agent.sock"}, []string{"agent.sock"}}
	s3Credentials = &secretKind{[]string{"credentials"}, []string{"credentials"}}
)

// kindOfFile returns the kind of a single file.
func kindOfFile(name string) *secretKind {
	for _, k := range []*secretKind{sshKey, sshPassphrase, sshPassword, sshKnownHosts, sshAgent, s3Credentials} {
		if slices.ContainsFunc(k.endings, func(end string) bool { return strings.HasSuffix(name, end) }) {
			return k
		}
	}
	return dockerConfig
}

// secrets is what the user mounted to let bootfs in elsewhere: directories, and
// single files as Docker mounts them.
type secrets struct {
	mounted held
	places  []string // in the engine's root, in the order in which they count
}

// secret is a file that was found.
type secret struct {
	name string // its path in the engine's root, where it is before the switch
	path string // the way to it by descriptor
}

// secretPlaces returns bootimage.SecretsDir and everything that begins with
// bootimage.SecretsPrefix.
func secretPlaces() ([]string, error) {
	names, err := filepath.Glob(bootimage.SecretsPrefix + "*")
	return append([]string{bootimage.SecretsDir}, names...), err
}

// find returns the secrets of a kind that are there now.
func (s secrets) find(k *secretKind) []secret {
	var found []secret
	for _, place := range s.places {
		info, err := s.mounted.stat(place)
		if err != nil {
			continue
		}
		names := k.names
		if !info.IsDir() {
			if kindOfFile(place) != k {
				continue
			}
			names = []string{""}
		}
		for _, name := range names {
			p := path.Join(place, name)
			if _, err := s.mounted.stat(p); errors.Is(err, fs.ErrNotExist) {
				continue
			}
			at, _ := s.mounted.way(p)
			found = append(found, secret{p, at})
		}
	}
	return found
}

// check refuses what is no secret: to open a FIFO would wait for its writer, and
// a device may have no end.
func (s secret) check() error {
	info, err := os.Stat(s.path)
	switch {
	case err != nil:
	case !info.Mode().IsRegular():
		err = fmt.Errorf("it is %s, not a file", fileKind(info.Mode()))
	case info.Size() > maxSecret:
		err = errSecretSize
	}
	return s.told(err)
}

func fileKind(m fs.FileMode) string {
	switch m.Type() {
	case fs.ModeDir:
		return "a directory"
	case fs.ModeNamedPipe:
		return "a FIFO"
	case fs.ModeSocket:
		return "a socket"
	}
	return "a device"
}

var errSecretSize = fmt.Errorf("it has more than %d bytes", maxSecret)

func (s secret) read() ([]byte, error) {
	if err := s.check(); err != nil {
		return nil, err
	}
	var b []byte
	f, err := os.Open(s.path)
	if err == nil {
		defer f.Close()
		b, err = io.ReadAll(io.LimitReader(f, maxSecret+1))
	}
	if err == nil && len(b) > maxSecret {
		err = errSecretSize // files of the kernel's have size 0
	}
	return b, s.told(err)
}

// told is err with the name that the user knows.
func (s secret) told(err error) error {
	if e := (*fs.PathError)(nil); errors.As(err, &e) {
		err = e.Err // the path is not the user's
	}
	if err != nil {
		return fmt.Errorf("%s: %w", s.name, err)
	}
	return nil
}

// read returns the first secret of a kind, nil if there is none.
func (s secrets) read(k *secretKind) ([]byte, error) {
	found := s.find(k)
	if len(found) == 0 {
		return nil, nil
	}
	return found[0].read()
}

// registryAdvice is what to do where a registry lets nobody in.
const registryAdvice = "mount those of docker login as " + bootimage.SecretsDir + "/config.json"

// ssh is who we are to SSH servers. What files say is read when a store is
// opened, before the switch of the root; the agent is asked later too.
func (s secrets) ssh(c *settings) (sshstore.Options, error) {
	o := sshstore.Options{Password: c.sshPassword, Accept: bootimage.SecretsDir + "/known_hosts",
		Advice: "mount a key as " + bootimage.SecretsDir + "/id_ed25519"}
	for _, k := range []*secretKind{sshKey, sshPassphrase, sshKnownHosts} {
		for _, f := range s.find(k) {
			if err := f.check(); err != nil {
				return o, fmt.Errorf("credentials: %w", err)
			}
			switch k {
			case sshKey:
				o.Keys = append(o.Keys, f.name)
			case sshPassphrase:
				o.PassphraseFile = f.name
			case sshKnownHosts:
				o.KnownHosts = append(o.KnownHosts, f.name)
			}
		}
	}
	if o.Password == "" {
		b, err := s.read(sshPassword)
		if err != nil {
			return o, fmt.Errorf("credentials: %w", err)
		}
		o.Password = strings.TrimRight(string(b), "\r\n")
		if o.Password != "" {
			o.Advice = "correct the password in " + s.find(sshPassword)[0].name + ", or " + o.Advice
		}
	} else {
		o.Advice = "correct the password in DROPBEAR_PASSWORD, or " + o.Advice
	}
	if agents := s.find(sshAgent); len(agents) > 0 {
		o.Agent = agents[0].path
	} else if c.sshAgent != "" {
		// A variable of the app's may name what is not there yet.
		if socket, err := openPath(c.sshAgent); err == nil {
			o.Agent = byDescriptor(socket)
		}
	}
	return o, nil
}

// s3 is who we are to S3: what files say, read whenever it is asked for, and
// then what the container's variables say. The user's own files, which some of
// them name, are the app's.
func (s secrets) s3(c *settings) s3store.Options {
	tokens := map[string]held{}
	for _, variable := range []string{"AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE"} {
		name := c.getenv(variable)
		if name == "" {
			continue
		}
		// The file is replaced when it is renewed, and its directory stays; but
		// not if the file itself was mounted.
		paths := []string{path.Dir(name)}
		if mounted, err := mountinfo.Mounted(name); err == nil && mounted {
			paths = append(paths, path.Clean(name))
		}
		tokens[name], _ = hold(paths...) // what is missing is told when it is read
	}
	return s3store.Options{
		Advice: "mount them as " + bootimage.SecretsDir + "/credentials, in the form of ~/.aws/credentials",
		Sources: s3store.Sources{
			Profiles: func() ([]s3store.File, error) {
				var files []s3store.File
				for _, f := range s.find(s3Credentials) {
					b, err := f.read()
					if err != nil {
						return nil, err
					}
					files = append(files, s3store.File{Name: f.name, Data: b})
				}
				return files, nil
			},
			Getenv: func(name string) string {
				if name == "HOME" || name == "AWS_SHARED_CREDENTIALS_FILE" {
					return ""
				}
				return c.getenv(name)
			},
			ReadFile: func(name string) ([]byte, error) {
				at, _ := tokens[name].way(path.Clean(name))
				return secret{name, at}.read()
			},
		},
	}
}

// Resolve implements authn.Keychain.
func (s secrets) Resolve(target authn.Resource) (authn.Authenticator, error) {
	for _, f := range s.find(dockerConfig) {
		b, err := f.read()
		if err != nil {
			return nil, fmt.Errorf("registry credentials: %w", err)
		}
		c, err := parseDockerAuths(b)
		if err != nil {
			return nil, fmt.Errorf("registry credentials: %s: %w", f.name, err)
		}
		if a, ok := c.find(target.RegistryStr()); ok {
			return a, nil
		}
	}
	return authn.Anonymous, nil
}

// dockerAuths is what counts in a Docker configuration. Credential helpers are
// programs, which a boot image does not have.
type dockerAuths struct {
	Auths map[string]authn.AuthConfig `json:"auths"`
}

func parseDockerAuths(b []byte) (c dockerAuths, err error) {
	err = json.Unmarshal(b, &c)
	return c, err
}

func (c dockerAuths) find(registry string) (authn.Authenticator, bool) {
	if registry == "index.docker.io" {
		registry = authn.DefaultAuthKey
	}
	for _, key := range []string{registry, "https://" + registry, "https://" + registry + "/v2/"} {
		if a, ok := c.Auths[key]; ok {
			return authn.FromConfig(a), true
		}
	}
	return nil, false
}
