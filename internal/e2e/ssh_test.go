package e2e

import (
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/agent"

	"github.com/container-bootfs/bootfs/internal/testenv"
)

// sshHome is a home directory that has key as its own and knows the servers.
func sshHome(t *testing.T, key string, servers ...*testenv.SSHD) string {
	t.Helper()
	home := t.TempDir()
	if err := os.Mkdir(filepath.Join(home, ".ssh"), 0o700); err != nil {
		t.Fatal(err)
	}
	var known strings.Builder
	for _, s := range servers {
		known.WriteString(s.HostKey + "\n")
	}
	b, err := os.ReadFile(key)
	if err == nil {
		err = os.WriteFile(filepath.Join(home, ".ssh/id_ed25519"), b, 0o600)
	}
	if err == nil {
		err = os.WriteFile(filepath.Join(home, ".ssh/known_hosts"), []byte(known.String()), 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	return home
}

// convertSSH converts an image as a person at home there.
func convertSSH(home, store, layout, image string) ([]byte, error) {
	cmd := w.command("--boot", w.boot, "--store", store, "oci:"+layout, image)
	cmd.Env = append(cmd.Env, "HOME="+home, "SSH_AUTH_SOCK=")
	return cmd.CombinedOutput()
}

// startSSHD starts an SSH server until the test ends.
func startSSHD(t *testing.T, o testenv.SSHDOptions) *testenv.SSHD {
	t.Helper()
	s, err := testenv.StartSSHD(t.Context(), t.TempDir(), o)
	if err != nil {
		t.Fatal(err)
	}
	stopAtEnd(t, s)
	return s
}

// search is a program that looks for a text wherever the app may look.
const search = `import os, sys
want = sys.argv[1].encode()
for top in ["/run/secrets", "/.bootfs"] + ["/proc/" + p for p in os.listdir("/proc") if p.isdigit()]:
    for dir, _, files in os.walk(top):
        for f in files:
            f = os.path.join(dir, f)
            try:
                if (dir.startswith("/proc") and os.path.basename(f) not in ("environ", "cmdline")): continue
                if f == "/proc/%d/cmdline" % os.getpid() or "/proc/%d/task" % os.getpid() in f: continue
                if want in open(f, "rb").read(): print("found in", f)
            except OSError: pass
print("searched")`

// TestSSHStore converts to a server with casync, and runs from it with each
// kind of credential.
func TestSSHStore(t *testing.T) {
	t.Parallel()
	const password = "pl4nted at sshd"
	server := startSSHD(t, testenv.SSHDOptions{Password: password})
	store, image := "ssh://root@"+server.Address+"/srv/rootfs.castr", w.proxy.address+"/python:ssh"

	out, err := convertSSH(sshHome(t, server.Key), store, w.layout, image)
	if err == nil || !strings.Contains(string(out), "is not known") || !strings.Contains(string(out), "add to ~/.ssh/known_hosts: "+server.HostKey) {
		t.Fatalf("a server that nobody knows: %v, want it refused with what to do\n%s", err, out)
	}
	if out, err := convertSSH(sshHome(t, server.Key, server), store, w.layout, image); err != nil {
		t.Fatalf("convert: %v\n%s", err, out)
	}
	index, stores := inspect(t, image)
	if want, _ := inspect(t, w.image); index != want || len(stores) != 1 || stores[0] != store {
		t.Errorf("got index %s and stores %q, want %s and %s", index, stores, want, store)
	}

	// The image says whose key the server has.
	check := func(env ...string) (string, error) {
		cmd := w.command("check", "oci:"+w.layout, image)
		cmd.Env = append(append(cmd.Env, "SSH_AUTH_SOCK="), env...)
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
	if out, err := check("HOME=" + sshHome(t, server.Key)); err != nil {
		t.Errorf("check: %v\n%s", err, out)
	}
	// But it could say so of any server, to be told a password.
	if out, err := check("HOME="+t.TempDir(), "DROPBEAR_PASSWORD="+password); err == nil || !strings.Contains(out, "is not known") {
		t.Errorf("check with a password and without known hosts: %v\n%s", err, out)
	}
	if out, err := check("HOME="+sshHome(t, "/dev/null", server), "DROPBEAR_PASSWORD="+password); err != nil {
		t.Errorf("check with a password: %v\n%s", err, out)
	}
	// A key in a file of its own, with a passphrase.
	home := sshHome(t, server.Key, server)
	encrypted, passphrase := filepath.Join(home, ".ssh/id_ed25519"), filepath.Join(home, "passphrase")
	if out, err := exec.Command("ssh-keygen", "-q", "-p", "-N", "open it", "-f", encrypted).CombinedOutput(); err != nil {
		t.Fatalf("ssh-keygen: %v\n%s", err, out)
	}
	if err := os.WriteFile(passphrase, []byte("open it\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := check("HOME="+home, "BOOTFS_SSH_KEY="+encrypted, "BOOTFS_SSH_PASSPHRASE_FILE="+passphrase); err != nil {
		t.Errorf("check with an encrypted key: %v\n%s", err, out)
	}
	if out, err := check("HOME="+home, "BOOTFS_SSH_KEY="+encrypted); err == nil || !strings.Contains(out, "name the file that holds its passphrase") {
		t.Errorf("check with an encrypted key and no passphrase: %v\n%s", err, out)
	}

	// A key, as docker mounts secrets.
	key, err := os.ReadFile(server.Key)
	if err != nil {
		t.Fatal(err)
	}
	secret := strings.Split(string(key), "\n")[2]
	withKey := []string{"--env", "BOOTFS_LOG=debug", "--volume", server.Key + ":/run/secrets/bootfs_key:ro"}
	r := runBeside(t, append(withKey, image, "python3", "-c", search, secret)...)
	r.want(t, "searched\n")
	if strings.Contains(r.stderr, secret) {
		t.Errorf("the log has the key: %s", r.stderr)
	}

	// The password of container-bootfs, and in a file.
	r = runBeside(t, "--env", "BOOTFS_LOG=debug", "--env", "DROPBEAR_PASSWORD="+password, image, "python3", "-c", search, password)
	r.want(t, "searched\n")
	if strings.Contains(r.stderr, password) {
		t.Errorf("the log has the password: %s", r.stderr)
	}
	secrets := t.TempDir()
	if err := os.WriteFile(filepath.Join(secrets, "password"), []byte(password+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	runBeside(t, "--volume", secrets+":/.bootfs/secrets:ro", image, "python3", "-c", search, password).want(t, "searched\n")

	r = runBeside(t, image, "true")
	if r.code != 125 || !strings.Contains(r.stderr, "does not let root in: tried nothing, as no key, agent or password was given; mount a key as /.bootfs/secrets/id_ed25519") {
		t.Errorf("without a credential: exit %d, %s", r.code, r.stderr)
	}

	// An agent, of which boot makes use again when the server has been away.
	secrets = agentDir(t, key)
	id := startWith(t, besideFlags(), "--env", "BOOTFS_PREFETCH=none", "--volume", secrets+":/.bootfs/secrets:ro", image, "sleep", "1000")
	eventually(t, "the container runs", func() bool { return docker(t, "exec", id, "true").code == 0 })
	docker(t, "exec", id, "python3", "-c", "print('before')").want(t, "before\n")
	if err := server.Close(); err != nil {
		t.Error(err)
	}
	if err := server.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	docker(t, "exec", id, "python3", "-c", "import ssl, sqlite3, email.mime.text; print('after')").want(t, "after\n")

	// Another host key than that of the conversion.
	if err := server.Close(); err != nil {
		t.Error(err)
	}
	if err := server.NewHostKey(); err != nil {
		t.Fatal(err)
	}
	if err := server.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	r = runBeside(t, append(withKey, image, "true")...)
	if r.code != 125 || !strings.Contains(r.stderr, "is not the one that is pinned or known") ||
		!strings.Contains(r.stderr, "in the old one's place in /.bootfs/secrets/known_hosts: "+server.HostKey) {
		t.Errorf("a changed host key: exit %d, want it refused with what to do\n%s", r.code, r.stderr)
	}
	known := filepath.Join(sshHome(t, server.Key, server), ".ssh/known_hosts")
	runBeside(t, append(withKey, "--volume", known+":/run/secrets/bootfs_known_hosts:ro", image, "echo", "accepted")...).want(t, "accepted\n")
}

// agentDir is a directory with the socket of an agent that has key.
func agentDir(t *testing.T, key []byte) string {
	t.Helper()
	private, err := ssh.ParseRawPrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	ring := agent.NewKeyring()
	if err := ring.Add(agent.AddedKey{PrivateKey: private}); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	l, err := net.Listen("unix", filepath.Join(dir, "agent.sock"))
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
			go agent.ServeAgent(ring, c)
		}
	}()
	return dir
}

// TestSFTPSample converts to the server of samples/ssh, as its Dockerfile sets
// it up, and runs from it.
func TestSFTPSample(t *testing.T) {
	t.Parallel()
	const sample = "../../samples/ssh/"
	config, err := os.ReadFile(sample + "sshd_config")
	if err != nil {
		t.Fatal(err)
	}
	dockerfile, err := os.ReadFile(sample + "Dockerfile")
	if err != nil {
		t.Fatal(err)
	}
	setup := regexp.MustCompile(`(?s)&& (useradd .*?)\nCOPY`).FindSubmatch(dockerfile)
	if setup == nil {
		t.Fatalf("the Dockerfile adds no user:\n%s", dockerfile)
	}
	server := startSSHD(t, testenv.SSHDOptions{Config: string(config), Setup: string(setup[1])})
	cache, err := testenv.OpenCache()
	if err != nil {
		t.Fatal(err)
	}
	layout, err := cache.ScratchImage(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	home := sshHome(t, server.Key, server)
	store, image := "sftp://bootfs@"+server.Address+"/chunks/rootfs.castr", w.proxy.address+"/scratch:sftp"
	if out, err := convertSSH(home, store, layout, image); err != nil {
		t.Fatalf("convert: %v\n%s\n%s", err, out, server.Log())
	}
	if _, err := os.Stat(filepath.Join(server.Srv, "chunks/rootfs.castr")); err != nil {
		t.Error(err)
	}
	secrets := filepath.Join(home, ".ssh")
	r := runBeside(t, "--volume", secrets+":/.bootfs/secrets:ro", image, "cat", "/etc/passwd")
	if r.code != 0 || !strings.HasPrefix(r.stdout, "root:") {
		t.Errorf("%+v", r)
	}

	// What the server lets a client do: SFTP in its directory, and nothing else.
	ssh := []string{"-F", "none", "-i", server.Key, "-o", "UserKnownHostsFile=" + filepath.Join(secrets, "known_hosts"), "-o", "BatchMode=yes"}
	host, port, err := net.SplitHostPort(server.Address)
	if err != nil {
		t.Fatal(err)
	}
	for name, cmd := range map[string]*exec.Cmd{
		"a command":   exec.CommandContext(t.Context(), "ssh", append(ssh, "-p", port, "bootfs@"+host, "id")...),
		"forwarding":  exec.CommandContext(t.Context(), "ssh", append(ssh, "-p", port, "-o", "ExitOnForwardFailure=yes", "-W", server.Address, "bootfs@"+host)...),
		"root":        exec.CommandContext(t.Context(), "sftp", append(ssh, "-P", port, "root@"+host)...),
		"a password":  exec.CommandContext(t.Context(), "ssh", "-F", "none", "-p", port, "-o", "PubkeyAuthentication=no", "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-o", "BatchMode=yes", "bootfs@"+host),
		"another dir": exec.CommandContext(t.Context(), "sftp", append(ssh, "-P", port, "bootfs@"+host+":/etc/passwd", t.TempDir())...),
	} {
		if out, err := cmd.CombinedOutput(); err == nil {
			t.Errorf("%s is allowed: %s", name, out)
		}
	}
}
