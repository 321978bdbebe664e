package sshstore

import (
	"errors"
	"io"
	"net"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/agent"

	"github.com/container-bootfs/bootfs/chunkstore"
	"github.com/container-bootfs/bootfs/index"
)

// login reads a chunk that is not there, and returns why not, or nil when the
// server was asked.
func login(t *testing.T, address string, o Options) error {
	t.Helper()
	_, err := open(t, address, o).Get(t.Context(), index.ID{}, nil)
	if errors.Is(err, chunkstore.ErrNotFound) {
		return nil
	}
	return err
}

// wantRefused wants an error that is for good and says all of what.
func wantRefused(t *testing.T, err error, what ...string) {
	t.Helper()
	if err == nil {
		t.Errorf("got in, want an error with %q", what)
		return
	}
	wantTemporary(t, err, false)
	for _, w := range what {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("got %v, want it to say %q", err, w)
		}
	}
}

func TestHostKeys(t *testing.T) {
	t.Parallel()
	server := startServer(t)
	address := "sftp://root@" + server.addr + "/nonexistent"
	with := func(pins, known string) Options {
		o := Options{Keys: []string{server.key}}
		if pins != "" {
			o.HostKeys = strings.Split(pins, "|")
		}
		if known != "" {
			file := filepath.Join(t.TempDir(), "known_hosts")
			write(t, file, known+"\n")
			o.KnownHosts = []string{file}
		}
		return o
	}
	key := strings.SplitN(server.hostKey, " ", 2)[1]
	old, err := ssh.NewPublicKey(newKey(t, "ed25519").Public())
	if err != nil {
		t.Fatal(err)
	}
	oldLine := knownLine(server.addr, old)
	otherHost := strings.Replace(server.hostKey, "[127.0.0.1]", "[127.0.0.2]", 1)
	rsaKey, err := ssh.NewPublicKey(newKey(t, "rsa").Public())
	if err != nil {
		t.Fatal(err)
	}

	for name, o := range map[string]Options{
		"pinned":                           with(server.hostKey, ""),
		"pinned for any host":              with(key, ""),
		"one of two pins":                  with(oldLine+"|"+server.hostKey, ""),
		"known host beats pin":             with(oldLine, server.hostKey),
		"known":                            with("", server.hostKey),
		"known, other pinned":              with(otherHost, server.hostKey),
		"known among other kinds":          with("", knownLine(server.addr, rsaKey)+"\n"+server.hostKey),
		"pinned with a line for two hosts": with("example.com,"+server.hostKey, ""),
	} {
		if err := login(t, address, o); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	fingerprint := ssh.FingerprintSHA256(mustKey(t, key))
	unknown := []string{"is not known", fingerprint, "known_hosts: " + server.hostKey}
	wantRefused(t, login(t, address, with("", "")), unknown...)
	wantRefused(t, login(t, address, with(otherHost, "")), unknown...)
	wantRefused(t, login(t, address, with("", otherHost)), unknown...)
	changed := []string{"is not the one", fingerprint, ssh.FingerprintSHA256(old), "Somebody else", server.hostKey}
	wantRefused(t, login(t, address, with(oldLine, "")), changed...)
	wantRefused(t, login(t, address, with(server.hostKey, oldLine)), changed...)
	wantRefused(t, login(t, address, with("", oldLine)), changed...)
	wantRefused(t, login(t, address, with(knownLine(server.addr, rsaKey), "")), "no common algorithm", "rsa-sha2")
	wantRefused(t, login(t, address, with("", "@revoked "+server.hostKey)), "revoked")

	// A server that gets a new key under a running client.
	st := server.open("sftp", "/nonexistent")
	line, err := st.HostKey(t.Context())
	if err != nil || line != server.hostKey {
		t.Errorf("HostKey: got %q, %v, want %q", line, err, server.hostKey)
	}
	server.kill()
	server.newHostKey()
	server.start()
	_, err = st.Get(t.Context(), index.ID{}, nil)
	wantRefused(t, err, "is not the one", server.hostKey)

	for _, bad := range []string{"", "nonsense", "SHA256:abc", "* " + key, "|1|aa|bb " + key, "@cert-authority h " + key} {
		if _, err := New(address, Options{HostKeys: []string{bad}}); err == nil {
			t.Errorf("pin %q: got no error", bad)
		}
	}
	if _, err := New(address, Options{KnownHosts: []string{"/nonexistent"}}); err == nil {
		t.Error("known hosts in a file that is not there: got no error")
	}
}

func mustKey(t *testing.T, line string) ssh.PublicKey {
	t.Helper()
	key, _, _, _, err := ssh.ParseAuthorizedKey([]byte(line))
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func TestKeys(t *testing.T) {
	t.Parallel()
	server := startServer(t)
	address := "ssh://root@" + server.addr + "/nonexistent"
	dir := t.TempDir()
	pass, wrong := filepath.Join(dir, "pass"), filepath.Join(dir, "wrong")
	write(t, pass, "s3cret phrase\n")
	write(t, wrong, "wr0ng\n")
	encrypted, other := filepath.Join(dir, "encrypted"), filepath.Join(dir, "other")
	mine := newKey(t, "rsa")
	public := writeKey(t, encrypted, mine, "s3cret phrase")
	write(t, filepath.Join(server.dir, "authorized_keys"), string(ssh.MarshalAuthorizedKey(public)))
	writeKey(t, other, newKey(t, "ed25519"), "")

	socket := filepath.Join(dir, "agent")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	ring := agent.NewKeyring()
	if err := ring.Add(agent.AddedKey{PrivateKey: mine}); err != nil {
		t.Fatal(err)
	}
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go agent.ServeAgent(ring, c)
		}
	}()

	pins := []string{server.hostKey}
	for name, o := range map[string]Options{
		"encrypted":     {Keys: []string{other, encrypted}, PassphraseFile: pass},
		"agent":         {Agent: socket},
		"agent, others": {Agent: socket, Keys: []string{other}, Password: "s3cret"},
	} {
		o.HostKeys = pins
		if err := login(t, address, o); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, test := range []struct {
		o    Options
		want []string
	}{
		{Options{}, []string{"does not let root in", "nothing, as no key"}},
		{Options{Keys: []string{other}, Password: "s3cret"}, []string{"tried 1 key, the password"}},
		{Options{Agent: filepath.Join(dir, "none")}, []string{"tried the agent", "no such file"}},
	} {
		test.o.HostKeys = pins
		err := login(t, address, test.o)
		wantRefused(t, err, test.want...)
		if strings.Contains(err.Error(), "s3cret") {
			t.Errorf("a secret stands in %v", err)
		}
	}
	for _, o := range []Options{
		{Keys: []string{encrypted}},
		{Keys: []string{encrypted}, PassphraseFile: wrong},
		{Keys: []string{encrypted}, PassphraseFile: "/nonexistent"},
		{Keys: []string{"/nonexistent"}},
		{Keys: []string{pass}},
	} {
		if _, err := New(address, o); err == nil || strings.Contains(err.Error(), "wr0ng") || strings.Contains(err.Error(), "s3cret") {
			t.Errorf("%+v: got %v, want an error without secrets", o, err)
		}
	}
}

func TestPassword(t *testing.T) {
	t.Parallel()
	const right = "s3cret word"
	check := func(ok bool) (*ssh.Permissions, error) {
		if !ok {
			return nil, errors.New("no")
		}
		return nil, nil
	}
	for name, config := range map[string]*ssh.ServerConfig{
		"password": {PasswordCallback: func(c ssh.ConnMetadata, p []byte) (*ssh.Permissions, error) {
			return check(c.User() == "alice" && string(p) == right)
		}},
		"keyboard-interactive": {KeyboardInteractiveCallback: func(_ ssh.ConnMetadata, ask ssh.KeyboardInteractiveChallenge) (*ssh.Permissions, error) {
			answers, err := ask("", "", []string{"Password: "}, []bool{false})
			return check(err == nil && len(answers) == 1 && answers[0] == right)
		}},
	} {
		t.Run(name, func(t *testing.T) {
			addr, hostKey := fakeServer(t, config, func(_ string, ch io.ReadWriteCloser) {
				ch.Write(message{kind: kindHello, number: featureReadableStore}.append(nil))
				ch.Write(message{kind: kindMissing}.append(nil))
				io.Copy(io.Discard, ch)
			})
			o := Options{User: "alice", Password: right, HostKeys: []string{hostKey}}
			if err := login(t, "ssh://"+addr+"/a", o); err != nil {
				t.Error(err)
			}
			o.Password += "!"
			err := login(t, "ssh://"+addr+"/a", o)
			wantRefused(t, err, "does not let alice in", "tried the password")
			if strings.Contains(err.Error(), right) {
				t.Errorf("the password stands in %v", err)
			}
		})
	}
}
