package hosts

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"path"
	"strings"
	"time"
)

const (
	hostsFile  = "hosts.toml"
	defaultDir = "_default"

	// Limits of what is read, in bytes and files.
	maxHostsFile   = 64 << 10
	maxCertificate = 1 << 20
	maxFiles       = 1000
)

// Dir is a directory of the form certs.d/HOST/hosts.toml, which is
// containerd's, or certs.d/HOST/*.crt, which is docker's.
type Dir struct {
	Name string // for messages
	FS   fs.FS
	// Common says that certificates *.crt in the directory itself are
	// authorities for every host.
	Common bool
	// Local says that absolute paths in a hosts.toml are those of this machine.
	// Elsewhere they are taken to lead into the directory, from their last
	// "/certs.d/" on.
	Local bool
}

// file is a file in a Dir, or an absolute path of this machine.
type file struct {
	dir  *Dir
	path string // "" is none
}

func (f file) name() string {
	if f.dir == nil || f.path == "" || path.IsAbs(f.path) {
		return f.path
	}
	return path.Join(f.dir.Name, f.path)
}

func (f file) read() ([]byte, error) { return f.readAtMost(maxCertificate) }

// readAtMost reads a regular file of at most limit bytes.
func (f file) readAtMost(limit int64) ([]byte, error) {
	var in fs.File
	info, err := f.stat()
	if err == nil {
		if !info.Mode().IsRegular() {
			return nil, fmt.Errorf("%s: not a file", f.name())
		}
		if path.IsAbs(f.path) {
			in, err = os.Open(f.path)
		} else {
			in, err = f.dir.FS.Open(f.path)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", f.name(), bare(err))
	}
	defer in.Close()
	b, err := io.ReadAll(io.LimitReader(in, limit+1))
	switch {
	case err != nil:
		return nil, fmt.Errorf("%s: %w", f.name(), bare(err))
	case int64(len(b)) > limit:
		return nil, fmt.Errorf("%s: more than %d bytes", f.name(), limit)
	}
	return b, nil
}

func (f file) stat() (fs.FileInfo, error) {
	if path.IsAbs(f.path) {
		return os.Stat(f.path)
	}
	return fs.Stat(f.dir.FS, f.path)
}

// bare strips the path from a file's error.
func bare(err error) error {
	if e := (*fs.PathError)(nil); errors.As(err, &e) {
		return e.Err
	}
	return err
}

// commonAuthorities lists the authorities for every host.
func (h *Hosts) commonAuthorities() ([]file, error) {
	var out []file
	for i := range h.o.Dirs {
		d := &h.o.Dirs[i]
		if !d.Common {
			continue
		}
		found, err := d.certificates(".")
		if err != nil {
			return nil, err
		}
		out = append(out, found.ca...)
	}
	return out, nil
}

// configured returns what the directories say of the registry called host: its
// hosts in order, the one without a name being the registry itself. The first
// hosts.toml says which; certificates of the registry itself add up.
func (h *Hosts) configured(registry string) ([]server, error) {
	var list []server
	var own trust
	for i := range h.o.Dirs {
		d := &h.o.Dirs[i]
		dir, ok := d.find(namespace(registry))
		if !ok {
			continue
		}
		f := file{d, path.Join(dir, hostsFile)}
		if _, err := f.stat(); err == nil {
			if list != nil {
				continue
			}
			if list, err = readHosts(f); err != nil {
				return nil, err
			}
			continue
		}
		found, err := d.certificates(dir)
		if err != nil {
			return nil, err
		}
		own.ca = append(own.ca, found.ca...)
		own.client = append(own.client, found.client...)
	}
	if list == nil {
		list = []server{{}}
	}
	for i, s := range list {
		if s.host == "" || s.host == registry {
			list[i].trust.ca = append(s.trust.ca, own.ca...)
			list[i].trust.client = append(s.trust.client, own.client...)
		}
	}
	return list, nil
}

// trustOf returns what the directories say of TLS with host, nil if nothing.
func (h *Hosts) trustOf(host string) (*trust, error) {
	list, err := h.configured(host)
	if err != nil {
		return nil, err
	}
	for _, s := range list {
		t := s.trust
		if (s.host == "" || s.host == host) && (len(t.ca) > 0 || len(t.client) > 0 || t.skip) {
			return &t, nil
		}
	}
	return nil, nil
}

// DirName returns the name of the directory of host: as it is, or with
// "_PORT_" for a port, since a colon cannot stand in every path.
func DirName(host string) string {
	if i := strings.LastIndexByte(host, ':'); i > 0 {
		return host[:i] + "_" + host[i+1:] + "_"
	}
	return host
}

// find returns the subdirectory for host.
func (d *Dir) find(host string) (string, bool) {
	for _, name := range []string{DirName(host), host, defaultDir} {
		if !fs.ValidPath(name) || strings.Contains(name, "/") {
			continue
		}
		if info, err := fs.Stat(d.FS, name); err == nil && info.IsDir() {
			return name, true
		}
	}
	return "", false
}

// certificates finds docker's files in dir: NAME.crt is an authority, NAME.cert
// with NAME.key a client's certificate.
func (d *Dir) certificates(dir string) (trust, error) {
	var t trust
	entries, err := fs.ReadDir(d.FS, dir)
	if errors.Is(err, fs.ErrNotExist) {
		return t, nil
	}
	if err != nil {
		return t, fmt.Errorf("%s: %w", file{d, dir}.name(), bare(err))
	}
	if len(entries) > maxFiles {
		return t, fmt.Errorf("%s: more than %d files", file{d, dir}.name(), maxFiles)
	}
	for _, e := range entries {
		name := path.Join(dir, e.Name())
		switch path.Ext(name) {
		case ".crt":
			t.ca = append(t.ca, file{d, name})
		case ".cert":
			p := keyPair{cert: file{d, name}}
			if key := (file{d, strings.TrimSuffix(name, ".cert") + ".key"}); exists(key) {
				p.key = key
			}
			t.client = append(t.client, p)
		}
	}
	return t, nil
}

func exists(f file) bool {
	_, err := f.stat()
	return err == nil
}

// readHosts reads a hosts.toml: the hosts in their order, then the server.
func readHosts(f file) ([]server, error) {
	b, err := f.readAtMost(maxHostsFile)
	if err != nil {
		return nil, err
	}
	root, order, err := parseTOML(b)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", f.name(), err)
	}
	base := file{f.dir, path.Dir(f.path)}
	var out []server
	add := func(name string, t table) error {
		s, err := t.server(name, base)
		if err != nil {
			return fmt.Errorf("%s: host %q: %w", f.name(), name, err)
		}
		out = append(out, s)
		return nil
	}
	tables, _ := root["host"].(table)
	seen := make(map[string]bool)
	for _, name := range order {
		if seen[name] {
			continue // a table below it
		}
		seen[name] = true
		t, _ := tables[name].(table)
		if err := add(name, t); err != nil {
			return nil, err
		}
	}
	name, _ := root["server"].(string)
	if err := add(name, root); err != nil {
		return nil, err
	}
	return out, nil
}

// server reads the table of the host called name; "" is the registry itself,
// which can do all. The keys are containerd's.
func (t table) server(name string, base file) (server, error) {
	var s server
	if name != "" {
		u, err := parseServer(name)
		if err != nil {
			return s, err
		}
		s.scheme, s.host, s.path = u.Scheme, u.Host, u.Path
		if override, _ := t["override_path"].(bool); !override && !strings.HasSuffix(s.path, "/v2") {
			s.path += "/v2"
		}
		can, err := stringsOf(t["capabilities"])
		if err != nil {
			return s, fmt.Errorf("capabilities: %w", err)
		}
		s.cannotPull = len(can) > 0
		for _, c := range can {
			switch strings.ToLower(c) {
			case "pull":
				s.cannotPull = false
			case "resolve", "push":
			default:
				return s, fmt.Errorf("unknown capability %q", c)
			}
		}
	}
	s.trust.skip, _ = t["skip_verify"].(bool)
	names, err := stringsOf(t["ca"])
	if err != nil {
		return s, fmt.Errorf("ca: %w", err)
	}
	for _, n := range names {
		s.trust.ca = append(s.trust.ca, base.join(n))
	}
	if s.trust.client, err = keyPairs(t["client"], base); err != nil {
		return s, fmt.Errorf("client: %w", err)
	}
	header, _ := t["header"].(table)
	for name, v := range header {
		values, err := stringsOf(v)
		if err != nil {
			return s, fmt.Errorf("header %s: %w", name, err)
		}
		if s.header == nil {
			s.header = make(http.Header)
		}
		s.header[http.CanonicalHeaderKey(name)] = values
	}
	if d, ok := t["dial_timeout"].(string); ok {
		if s.dialTimeout, err = time.ParseDuration(d); err != nil {
			return s, fmt.Errorf("dial_timeout: %w", err)
		}
	}
	return s, nil
}

// join returns the file that a hosts.toml in the directory base names.
func (base file) join(name string) file {
	const marker = "/certs.d/"
	switch i := strings.LastIndex(name, marker); {
	case !path.IsAbs(name):
		name = path.Join(base.path, name)
		if base.dir.Local && !fs.ValidPath(name) { // it leads out of the directory
			return file{path: path.Join(base.dir.Name, name)}
		}
	case base.dir.Local:
		return file{path: name}
	case i >= 0:
		name = path.Clean(name[i+len(marker):])
	default:
		name = path.Join(base.path, path.Base(name))
	}
	return file{base.dir, name}
}

// keyPairs reads the value of "client".
func keyPairs(v any, base file) ([]keyPair, error) {
	list, ok := v.([]any)
	if !ok {
		names, err := stringsOf(v)
		if err != nil || len(names) == 0 {
			return nil, err
		}
		return []keyPair{{cert: base.join(names[0])}}, nil
	}
	var out []keyPair
	for _, e := range list {
		names, err := stringsOf(e)
		if err != nil {
			return nil, err
		}
		var p keyPair
		if _, pair := e.([]any); pair && len(names) != 2 {
			return nil, fmt.Errorf("%d files in a pair", len(names))
		}
		p.cert = base.join(names[0])
		if len(names) == 2 && names[1] != "" {
			p.key = base.join(names[1])
		}
		out = append(out, p)
	}
	return out, nil
}

// stringsOf returns the strings of a value that is one or a list of them.
func stringsOf(v any) ([]string, error) {
	switch v := v.(type) {
	case nil:
		return nil, nil
	case string:
		return []string{v}, nil
	case []any:
		out := make([]string, len(v))
		for i, e := range v {
			s, ok := e.(string)
			if !ok {
				return nil, fmt.Errorf("%v is no string", e)
			}
			out[i] = s
		}
		return out, nil
	}
	return nil, fmt.Errorf("%v is neither a string nor a list of strings", v)
}
