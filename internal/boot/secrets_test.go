package boot

import (
	"maps"
	"net"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/authn"
	"golang.org/x/sys/unix"
)

// host is an authn.Resource.
type host string

func (h host) String() string      { return string(h) }
func (h host) RegistryStr() string { return string(h) }

// planted are secrets in each form, and where they were mounted.
func planted(t *testing.T, files map[string]string) (s secrets, dir string) {
	t.Helper()
	dir = t.TempDir()
	paths := []string{filepath.Join(dir, "nothing"), filepath.Join(dir, "secrets")}
	for _, name := range slices.Sorted(maps.Keys(files)) {
		p := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(p), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p, []byte(files[name]), 0o600); err != nil {
			t.Fatal(err)
		}
		if filepath.Dir(name) == "." {
			paths = append(paths, p)
		}
	}
	return heldSecrets(t, paths...), dir
}

func heldSecrets(t *testing.T, places ...string) secrets {
	t.Helper()
	mounted, err := hold(places...)
	if err != nil {
		t.Fatal(err)
	}
	return secrets{mounted, places}
}

func TestSecretsByName(t *testing.T) {
	s, dir := planted(t, map[string]string{
		"secrets/id_ed25519": "1", "secrets/id_rsa": "2", "secrets/known_hosts": "3", "secrets/other": "4", "secrets/config.json": "5",
		"bootfs_deploy_key": "6", "bootfs_passphrase": "7", "bootfs-ssh-password": "8\r\n", "bootfs.credentials": "9", "bootfs": "10", "bootfs.json": "11",
	})
	for kind, want := range map[*secretKind]string{
		sshKey: "1 2 6", sshKnownHosts: "3", sshPassphrase: "7", sshPassword: "8", s3Credentials: "9", dockerConfig: "5 10 11", sshAgent: "",
	} {
		var got []string
		for _, f := range s.find(kind) {
			b, err := f.read()
			if err != nil || !strings.HasPrefix(f.name, dir) {
				t.Errorf("%+v: %v", f, err)
			}
			got = append(got, strings.TrimSpace(string(b)))
		}
		if strings.Join(got, " ") != want {
			t.Errorf("%v: got %q, want %q", kind.names, got, want)
		}
	}
	o, err := s.ssh(&settings{})
	if err != nil {
		t.Fatal(err)
	}
	key := func(name string) string { return filepath.Join(dir, name) }
	if want := []string{key("secrets/id_ed25519"), key("secrets/id_rsa"), key("bootfs_deploy_key")}; !reflect.DeepEqual(o.Keys, want) {
		t.Errorf("keys: got %q, want %q", o.Keys, want)
	}
	if o.PassphraseFile != key("bootfs_passphrase") || !reflect.DeepEqual(o.KnownHosts, []string{key("secrets/known_hosts")}) || o.Password != "8" || o.Agent != "" {
		t.Errorf("got %+v", o)
	}
	if o, err = s.ssh(&settings{sshPassword: "dropbear"}); err != nil || o.Password != "dropbear" {
		t.Errorf("with a variable: got password %q, %v", o.Password, err)
	}
}

// TestSecretsStay: secrets are read when their names are gone from every path,
// as they are now and not as they were.
func TestSecretsStay(t *testing.T) {
	const login = `{"auths": {"h": {"username": "joe", "password": %}}}`
	s, dir := planted(t, map[string]string{"secrets/other": "", "bootfs.json": strings.Replace(login, "%", `"one"`, 1)})
	password := func() string {
		a, err := s.Resolve(host("h"))
		if err != nil {
			return err.Error()
		}
		c, err := a.Authorization()
		if err != nil {
			return err.Error()
		}
		return c.Password
	}
	if got := password(); got != "one" {
		t.Errorf("got %q, want one", got)
	}
	moved := filepath.Join(t.TempDir(), "moved")
	if err := os.Rename(dir, moved); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(moved, "bootfs.json"), []byte(strings.Replace(login, "%", `"two"`, 1)), 0o600); err != nil {
		t.Fatal(err)
	}
	if got := password(); got != "two" {
		t.Errorf("got %q, want two", got)
	}
	if err := os.WriteFile(filepath.Join(moved, "secrets/config.json"), []byte(strings.Replace(login, "%", `"three"`, 1)), 0o600); err != nil {
		t.Fatal(err)
	}
	if got := password(); got != "three" {
		t.Errorf("got %q, want three", got)
	}
	if a, err := s.Resolve(host("elsewhere")); err != nil || a != authn.Anonymous {
		t.Errorf("another host: got %v, %v, want nothing", a, err)
	}
	if err := os.WriteFile(filepath.Join(moved, "secrets/config.json"), make([]byte, maxSecret+1), 0o600); err != nil {
		t.Fatal(err)
	}
	if got := password(); !strings.Contains(got, "secrets/config.json: it has more than") || strings.Contains(got, "/proc") {
		t.Errorf("a large one: got %q", got)
	}
}

// TestSecretsThatAreNoFiles: what cannot be read to an end is refused by name,
// at once.
func TestSecretsThatAreNoFiles(t *testing.T) {
	dir := t.TempDir()
	secretsDir := filepath.Join(dir, "secrets")
	if err := os.Mkdir(secretsDir, 0o700); err != nil {
		t.Fatal(err)
	}
	s := heldSecrets(t, secretsDir)
	names := []string{"config.json", "id_ed25519", "passphrase", "password", "known_hosts", "credentials"}
	for _, c := range []struct {
		says string
		make func(path string) error
	}{
		{"it is a FIFO, not a file", func(p string) error { return unix.Mkfifo(p, 0o600) }},
		{"it is a device, not a file", func(p string) error { return os.Symlink("/dev/zero", p) }},
		{"it is a directory, not a file", func(p string) error { return os.Mkdir(p, 0o700) }},
		{"it is a socket, not a file", func(p string) error { return unix.Mknod(p, unix.S_IFSOCK|0o600, 0) }},
		{"it has more than 1048576 bytes", func(p string) error {
			if err := os.WriteFile(p, nil, 0o600); err != nil {
				return err
			}
			return os.Truncate(p, 1<<40)
		}},
	} {
		for _, name := range names {
			p := filepath.Join(secretsDir, name)
			if err := c.make(p); err != nil {
				t.Fatal(err)
			}
			var err error
			switch name {
			case "config.json":
				_, err = s.Resolve(host("h"))
			case "credentials":
				_, err = s.s3(&settings{}).Sources.Profiles()
			default:
				_, err = s.ssh(&settings{})
			}
			if err == nil || !strings.Contains(err.Error(), p+": "+c.says) {
				t.Errorf("%s: got %v, want %q", name, err, c.says)
			}
			if err := os.Remove(p); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// TestSSHAgent: the agent of the secrets, else that of the variable, is reached
// after its path has gone.
func TestSSHAgent(t *testing.T) {
	dir, err := os.MkdirTemp("", "agent") // short: a socket's path
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	listen := func(name string) string {
		l, err := net.Listen("unix", filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.Close() })
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				c.Write([]byte(name))
				c.Close()
			}
		}()
		return filepath.Join(dir, name)
	}
	answer := func(socket string) string {
		c, err := net.Dial("unix", socket)
		if err != nil {
			return err.Error()
		}
		defer c.Close()
		b := make([]byte, 64)
		n, _ := c.Read(b)
		return string(b[:n])
	}
	if err := os.Mkdir(filepath.Join(dir, "secrets"), 0o700); err != nil {
		t.Fatal(err)
	}
	of := listen("variable")
	none := heldSecrets(t)
	variable, err := none.ssh(&settings{sshAgent: of})
	if err != nil {
		t.Fatal(err)
	}
	absent, err := none.ssh(&settings{sshAgent: of + "-not"})
	if err != nil || absent.Agent != "" {
		t.Errorf("a variable that leads nowhere: got %q, %v", absent.Agent, err)
	}
	listen("secrets/agent.sock")
	s := heldSecrets(t, filepath.Join(dir, "secrets"))
	secret, err := s.ssh(&settings{sshAgent: of})
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Rename(dir, dir+"-gone"); err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir + "-gone")
	for socket, want := range map[string]string{variable.Agent: "variable", secret.Agent: "secrets/agent.sock"} {
		if got := answer(socket); got != want {
			t.Errorf("%s: got %q, want %q", socket, got, want)
		}
	}
}

// TestSecretsS3: files count as they are now, and the app's own do not.
func TestSecretsS3(t *testing.T) {
	s, dir := planted(t, map[string]string{"secrets/credentials": "one", "bootfs-credentials": "two", "token/token": "jwt", "apps/credentials": "no"})
	tokens := filepath.Join(dir, "token")
	o := s.s3(&settings{env: []string{
		"AWS_WEB_IDENTITY_TOKEN_FILE=" + tokens + "/token", "AWS_SHARED_CREDENTIALS_FILE=" + dir + "/apps/credentials", "HOME=" + dir, "AWS_REGION=r", "AWS_REGION_2=x",
	}})
	read := func() string {
		t.Helper()
		files, err := o.Sources.Profiles()
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, f := range files {
			if !strings.HasPrefix(f.Name, dir) {
				t.Errorf("%s is not the name that the user knows", f.Name)
			}
			got = append(got, string(f.Data))
		}
		return strings.Join(got, " ")
	}
	if got := read(); got != "one two" {
		t.Errorf("got %q", got)
	}
	if err := os.WriteFile(filepath.Join(dir, "secrets/credentials"), []byte("new"), 0o600); err != nil {
		t.Fatal(err)
	}
	if got := read(); got != "new two" {
		t.Errorf("after a change: got %q", got)
	}
	for name, want := range map[string]string{"AWS_REGION": "r", "AWS_SHARED_CREDENTIALS_FILE": "", "HOME": "", "AWS_PROFILE": ""} {
		if got := o.Sources.Getenv(name); got != want {
			t.Errorf("%s: got %q, want %q", name, got, want)
		}
	}
	// As after the switch of the root, the path leads nowhere.
	if err := os.Rename(tokens, filepath.Join(dir, "moved")); err != nil {
		t.Fatal(err)
	}
	if b, err := o.Sources.ReadFile(tokens + "/token"); err != nil || string(b) != "jwt" {
		t.Errorf("the token: got %q, %v", b, err)
	}
	if b, err := o.Sources.ReadFile(filepath.Join(dir, "apps/credentials")); err == nil {
		t.Errorf("a file that no variable of boot's names: got %q", b)
	}
}
