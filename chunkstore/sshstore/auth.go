package sshstore

import (
	"bytes"
	"cmp"
	"crypto/ed25519"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/agent"
	"golang.org/x/crypto/ssh/knownhosts"

	"github.com/container-bootfs/bootfs/internal/httpio"
)

// auth is who we are and whom we trust.
type auth struct {
	keys     []ssh.Signer
	agent    string
	password string
	pins     []pin
	known    ssh.HostKeyCallback // nil: no files
	accept   string              // where to add a key
	advice   string              // where to put credentials
}

// pin is a host key that is trusted.
type pin struct {
	hosts []string // as known_hosts writes them; none: any
	key   ssh.PublicKey
}

// UserOptions are those of the person at the terminal: the name, agent, keys
// and known hosts that ssh would use, as far as they are there.
func UserOptions() Options {
	o := Options{User: os.Getenv("USER"), Agent: os.Getenv("SSH_AUTH_SOCK"), Accept: "~/.ssh/known_hosts",
		Advice: "put a key into ~/.ssh, or with ssh-add into an agent if it has a passphrase"}
	there := func(path string) bool {
		_, err := os.Stat(path)
		return err == nil
	}
	known := []string{"/etc/ssh/ssh_known_hosts"}
	if home, err := os.UserHomeDir(); err == nil {
		dir := filepath.Join(home, ".ssh")
		known = append(known, filepath.Join(dir, "known_hosts"))
		for _, name := range []string{"id_ed25519", "id_ecdsa", "id_rsa"} {
			// One with a passphrase is for the agent: there is nobody to ask.
			if b, err := os.ReadFile(filepath.Join(dir, name)); err == nil {
				if _, err := ssh.ParsePrivateKey(b); err == nil {
					o.Keys = append(o.Keys, filepath.Join(dir, name))
				}
			}
		}
	}
	for _, path := range known {
		if there(path) {
			o.KnownHosts = append(o.KnownHosts, path)
		}
	}
	return o
}

// newAuth reads what o names.
func newAuth(o Options) (*auth, error) {
	a := &auth{agent: o.Agent, password: o.Password, accept: cmp.Or(o.Accept, "known_hosts"), advice: o.Advice}
	for _, file := range o.Keys {
		key, err := readKey(file, o.PassphraseFile)
		if err != nil {
			return nil, fmt.Errorf("key %s: %w", file, err)
		}
		a.keys = append(a.keys, key)
	}
	for _, line := range o.HostKeys {
		p, err := parsePin(line)
		if err != nil {
			return nil, err
		}
		a.pins = append(a.pins, p...)
	}
	if len(o.KnownHosts) > 0 {
		known, err := knownhosts.New(o.KnownHosts...)
		if err != nil {
			return nil, fmt.Errorf("known hosts: %w", err)
		}
		a.known = known
	}
	return a, nil
}

func readKey(file, passphraseFile string) (ssh.Signer, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	key, err := ssh.ParsePrivateKey(b)
	var encrypted *ssh.PassphraseMissingError
	if !errors.As(err, &encrypted) {
		return key, err
	}
	if passphraseFile == "" {
		return nil, errors.New("it is encrypted: name the file that holds its passphrase")
	}
	passphrase, err := os.ReadFile(passphraseFile)
	if err != nil {
		return nil, err
	}
	key, err = ssh.ParsePrivateKeyWithPassphrase(b, bytes.TrimRight(passphrase, "\r\n"))
	if err != nil {
		return nil, fmt.Errorf("the passphrase in %s does not open it: %w", passphraseFile, err)
	}
	return key, nil
}

// parsePin reads what Options.HostKeys holds.
func parsePin(line string) ([]pin, error) {
	fail := func(err error) ([]pin, error) {
		return nil, fmt.Errorf("pinned host key %.100q: %s: want a line of known_hosts, as ssh-keyscan prints it, or a key alone",
			line, httpio.OneLine(err.Error(), 200)) // it repeats what stands there
	}
	if key, _, options, _, err := ssh.ParseAuthorizedKey([]byte(line)); err == nil && len(options) == 0 {
		return []pin{{key: key}}, nil
	}
	var pins []pin
	for rest := []byte(line); ; {
		marker, hosts, key, _, next, err := ssh.ParseKnownHosts(rest)
		if errors.Is(err, io.EOF) && len(pins) > 0 {
			return pins, nil
		}
		switch {
		case err != nil:
			return fail(err)
		case marker != "":
			return fail(fmt.Errorf("%q cannot be pinned", marker))
		}
		for _, h := range hosts {
			if strings.ContainsAny(h, "*?!|") {
				return fail(errors.New("a pattern or hash stands for the host"))
			}
		}
		pins = append(pins, pin{hosts, key})
		rest = next
	}
}

// pinned returns the pinned keys of a host.
func (a *auth) pinned(host string) []ssh.PublicKey {
	var keys []ssh.PublicKey
	for _, p := range a.pins {
		if len(p.hosts) == 0 || slices.Contains(p.hosts, knownhosts.Normalize(host)) {
			keys = append(keys, p.key)
		}
	}
	return keys
}

// wanted returns the keys that a host may have.
func (a *auth) wanted(host string) []ssh.PublicKey {
	if a.known == nil {
		return a.pinned(host)
	}
	// A key that nobody has makes known_hosts tell those that it has.
	probe, err := ssh.NewPublicKey(ed25519.PublicKey(make([]byte, ed25519.PublicKeySize)))
	if err != nil {
		return nil
	}
	var keys []ssh.PublicKey
	var told *knownhosts.KeyError
	if errors.As(a.known(host, &net.TCPAddr{}, probe), &told) {
		for _, k := range told.Want {
			keys = append(keys, k.Key)
		}
	}
	if len(keys) == 0 {
		return a.pinned(host)
	}
	return keys
}

// algorithms are those by which a server shows one of keys. A server has keys
// of several kinds and would otherwise choose one that is not among them.
func algorithms(keys []ssh.PublicKey) []string {
	var names []string
	for _, k := range keys {
		add := []string{k.Type()}
		if k.Type() == ssh.KeyAlgoRSA {
			add = []string{ssh.KeyAlgoRSASHA512, ssh.KeyAlgoRSASHA256}
		}
		for _, name := range add {
			if !slices.Contains(names, name) {
				names = append(names, name)
			}
		}
	}
	return names
}

// checkHostKey refuses a key that is not trusted, and says what to do. What
// stands in the files of known hosts is what somebody here has accepted, so it
// counts before what was pinned elsewhere.
func (a *auth) checkHostKey(host string, remote net.Addr, key ssh.PublicKey) error {
	if a.known != nil {
		err := a.known(host, remote, key)
		var told *knownhosts.KeyError
		if err == nil || !errors.As(err, &told) {
			return err // nil, or revoked
		}
	}
	want := a.wanted(host)
	if slices.ContainsFunc(want, func(k ssh.PublicKey) bool { return bytes.Equal(k.Marshal(), key.Marshal()) }) {
		return nil
	}
	line := knownhosts.Line([]string{host}, key)
	if len(want) == 0 {
		return fmt.Errorf("the host key of %s is not known: it shows %s. If that is the server's (ssh-keygen -lf on it tells), add to %s: %s",
			host, describe(key), a.accept, line)
	}
	var names []string
	for _, k := range want {
		names = append(names, describe(k))
	}
	return fmt.Errorf("the host key of %s is not the one that is pinned or known: it shows %s, want %s. Somebody else may be answering. "+
		"If the server got a new key (ssh-keygen -lf on it tells), put in the old one's place in %s: %s",
		host, describe(key), strings.Join(names, " or "), a.accept, line)
}

func describe(k ssh.PublicKey) string { return k.Type() + " " + ssh.FingerprintSHA256(k) }

// handshake makes of raw an SSH connection to a trusted server that lets us in,
// and returns also its host key as a line of known_hosts.
func (a *auth) handshake(raw net.Conn, to address) (*ssh.Client, string, error) {
	var (
		hostKey  string
		refused  error // why the host key is
		agentErr error
		tried    []string
	)
	config := &ssh.ClientConfig{
		User:              to.user,
		ClientVersion:     "SSH-2.0-bootfs",
		HostKeyAlgorithms: algorithms(a.wanted(to.host)),
		HostKeyCallback: func(_ string, remote net.Addr, key ssh.PublicKey) error {
			hostKey = knownhosts.Line([]string{to.host}, key)
			refused = a.checkHostKey(to.host, remote, key)
			return refused
		},
	}
	signers := slices.Clone(a.keys)
	if len(a.keys) > 0 {
		keys := "1 key"
		if n := len(a.keys); n > 1 {
			keys = fmt.Sprintf("%d keys", n)
		}
		tried = append(tried, keys)
	}
	if a.agent != "" {
		tried = append(tried, "the agent")
		socket, err := net.Dial("unix", a.agent)
		if err == nil {
			defer socket.Close()
			// An agent may want to ask somebody who is not there.
			socket.SetDeadline(time.Now().Add(dialPatience))
			var more []ssh.Signer
			more, err = agent.NewClient(socket).Signers()
			signers = append(signers, more...)
		}
		agentErr = err
	}
	if len(signers) > 0 {
		config.Auth = append(config.Auth, ssh.PublicKeys(signers...))
	}
	if a.password != "" {
		tried = append(tried, "the password")
		config.Auth = append(config.Auth, ssh.Password(a.password),
			ssh.KeyboardInteractive(func(_, _ string, questions []string, _ []bool) ([]string, error) {
				return slices.Repeat([]string{a.password}, len(questions)), nil
			}))
	}
	c, channels, requests, err := ssh.NewClientConn(raw, to.host, config)
	if err == nil {
		return ssh.NewClient(c, channels, requests), hostKey, nil
	}
	var algorithm *ssh.AlgorithmNegotiationError
	switch {
	case refused != nil:
		err = permanent(refused)
	case errors.As(err, &algorithm) && len(config.HostKeyAlgorithms) > 0:
		err = permanent(fmt.Errorf("%w; the known or pinned host keys are of type %s", err, strings.Join(config.HostKeyAlgorithms, ", ")))
	case errors.As(err, &algorithm):
		err = permanent(err)
	case strings.Contains(err.Error(), "unable to authenticate"),
		// A refusal before the first question of keyboard-interactive, which the
		// library takes for out of place.
		strings.Contains(err.Error(), "unexpected message type 51"):
		if len(tried) == 0 {
			tried = []string{"nothing, as no key, agent or password was given"}
		}
		err = permanent(fmt.Errorf("%s does not let %s in: tried %s", to.host, to.user, strings.Join(tried, ", ")))
		if agentErr != nil {
			err = permanent(fmt.Errorf("%w; the agent: %w", err, agentErr))
		}
		if a.advice != "" {
			err = permanent(fmt.Errorf("%w; %s", err, a.advice))
		}
	}
	return nil, "", err
}
