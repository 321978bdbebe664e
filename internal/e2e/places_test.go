package e2e

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/container-bootfs/bootfs/internal/faultproxy"
	"github.com/container-bootfs/bootfs/internal/testenv"
)

// A place is where the chunks of an image lie, and how a container gets there.
type place struct {
	name        string
	store       string   // that the converter is told; "" is beside the image
	env         []string // of the converter
	recorded    string   // the store as it stands in the image
	destination string   // that the converter is told
	image       string   // that docker runs
	run         []string // further flags of docker run
	secrets     []string // that the place takes, and nobody else must see
	before      func(t *testing.T)
}

// TestEveryPlace converts one image to every kind of place that chunks can lie
// at, and runs it from there: the same index, the same files, and an
// environment that tells the program nothing of where it came from.
func TestEveryPlace(t *testing.T) {
	cache, err := testenv.OpenCache()
	if err != nil {
		t.Fatal(err)
	}
	layout, err := cache.ScratchImage(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	source := w.proxy.address + "/places:source"
	if err := testenv.Push(t.Context(), layout, source); err != nil {
		t.Fatal(err)
	}
	wantFiles := docker(t, append(slices.Clone(readEverything), source, "cat", "/testapp", "/etc/passwd", "/etc/group")...)
	if wantFiles.code != 0 || len(wantFiles.stdout) < 1<<20 {
		t.Fatalf("the source image: exit %d, %d bytes, %s", wantFiles.code, len(wantFiles.stdout), wantFiles.stderr)
	}
	wantEnv := programView(t, docker(t, append(slices.Clone(readEverything), source, "env")...))

	indexes := make(chan string, 100)
	t.Run("from", func(t *testing.T) {
		for _, p := range places(t, cache) {
			t.Run(p.name, func(t *testing.T) {
				t.Parallel()
				args := []string{"--boot", w.boot}
				if p.store != "" {
					args = append(args, "--store", p.store)
				}
				convert := w.command(append(args, "oci:"+layout, p.destination)...)
				convert.Env = append(convert.Env, p.env...)
				out, err := convert.CombinedOutput()
				if err != nil {
					t.Fatalf("convert: %v\n%s", err, out)
				}
				p.wantNoSecret(t, "the converter's output", string(out))
				index, stores := inspect(t, p.destination)
				indexes <- index
				if got := strings.Join(stores, " "); got != p.recorded {
					t.Errorf("the image records the stores %q, want %q", got, p.recorded)
				}
				if p.before != nil {
					p.before(t)
				}
				flags := append(p.run, "--env", "BOOTFS_LOG=debug")
				r := run(t, append(slices.Clone(flags), p.image, "cat", "/testapp", "/etc/passwd", "/etc/group")...)
				if r.code != 0 || r.stdout != wantFiles.stdout {
					t.Errorf("exit %d, %d bytes, want the %d of the source image\n%s", r.code, len(r.stdout), len(wantFiles.stdout), r.stderr)
				}
				p.wantNoSecret(t, "boot's log", r.stderr)
				r = run(t, append(slices.Clone(flags), p.image, "env")...)
				if got := programView(t, r); got != wantEnv {
					t.Errorf("the program sees\n%s, in the source image\n%s", got, wantEnv)
				}
			})
		}
	})
	close(indexes)
	first := ""
	for x := range indexes {
		if first == "" {
			first = x
		}
		if x != first || x == "" {
			t.Errorf("index %s at one place, %s at another", first, x)
		}
	}
}

// readEverything runs the source image as converted ones are run.
var readEverything = []string{"run", "--rm", "--network", "host"}

// programView is what testapp env says, without what differs between any two
// containers.
func programView(t *testing.T, r result) string {
	t.Helper()
	var view map[string]any
	if err := json.Unmarshal([]byte(r.stdout), &view); err != nil || r.code != 0 {
		t.Fatalf("exit %d, %v, stdout %q, stderr %q", r.code, err, r.stdout, r.stderr)
	}
	delete(view, "pid")
	b, err := json.Marshal(view)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// inspect returns the index digest of a converted image and the stores that it
// records.
func inspect(t *testing.T, image string) (index string, stores []string) {
	t.Helper()
	out, err := w.command("inspect", "--json", image).CombinedOutput()
	if err != nil {
		t.Fatalf("inspect: %v\n%s", err, out)
	}
	var i struct {
		Platforms []struct {
			IndexDigest string   `json:"indexDigest"`
			Stores      []string `json:"stores"`
		} `json:"platforms"`
	}
	if err := json.Unmarshal(out, &i); err != nil || len(i.Platforms) != 1 {
		t.Fatalf("inspect: %v\n%s", err, out)
	}
	return i.Platforms[0].IndexDigest, i.Platforms[0].Stores
}

func (p *place) wantNoSecret(t *testing.T, where, text string) {
	t.Helper()
	for _, s := range p.secrets {
		if strings.Contains(text, s) {
			t.Errorf("%s has the credential %q:\n%s", where, s, text)
		}
	}
}

// places starts a server of each kind until the test ends.
func places(t *testing.T, cache *testenv.Cache) []*place {
	t.Helper()
	ctx := t.Context()
	dir := t.TempDir()

	v3, err := cache.StartDistribution(ctx, filepath.Join(dir, "v3"), "")
	if err != nil {
		t.Fatal(err)
	}
	stopAtEnd(t, v3)
	goRegistry, err := testenv.StartGoRegistry()
	if err != nil {
		t.Fatal(err)
	}
	stopAtEnd(t, goRegistry)
	// As some registries do, it answers a Range with all of the blob.
	rangeless, err := faultproxy.New("http://" + goRegistry.Address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(rangeless.Close)
	rangeless.Set(faultproxy.IgnoreRange())
	site, err := os.ReadFile("../../samples/http/nginx.conf")
	if err != nil {
		t.Fatal(err)
	}
	const password = "pl4nted-at-nginx"
	web, err := testenv.StartNginx(ctx, filepath.Join(dir, "nginx"), string(site), map[string]string{"ci": password})
	if err != nil {
		t.Fatal(err)
	}
	stopAtEnd(t, web)

	tagged := func(tag string) string { return w.proxy.address + "/places:" + tag }
	list := []*place{
		{name: "docker-registry", destination: w.registry.Address + "/places:converted", recorded: "registry://" + w.registry.Address + "/places"},
		{name: "distribution 3", destination: v3.Address + "/places:converted", recorded: "registry://" + v3.Address + "/places"},
		{name: "go-containerregistry", destination: goRegistry.Address + "/places:converted", recorded: "registry://" + goRegistry.Address + "/places"},
		{name: "registry without Range", destination: rangeless.Addr() + "/rangeless:converted", recorded: "registry://" + rangeless.Addr() + "/rangeless"},
		{
			name: "another registry", destination: tagged("apart"),
			store: "registry://" + v3.Address + "/packs", recorded: "registry://" + v3.Address + "/packs",
		},
		{
			name: "directory", destination: tagged("directory"),
			store: filepath.Join(dir, "rootfs.castr"), recorded: filepath.Join(dir, "rootfs.castr"),
			run: []string{"--volume", dir + ":" + dir + ":ro"},
		},
		{
			name: "web server", destination: tagged("web"), secrets: []string{password},
			store:    "http://ci:" + password + "@" + web.Address + "/rootfs.castr",
			recorded: "http://" + web.Address + "/rootfs.castr",
		},
	}
	server := startSSHD(t, testenv.SSHDOptions{})
	home := sshHome(t, server.Key, server)
	key, err := os.ReadFile(server.Key)
	if err != nil {
		t.Fatal(err)
	}
	for scheme, name := range map[string]string{"ssh": "casync over SSH", "sftp": "SFTP"} {
		store := scheme + "://root@" + server.Address + "/srv/" + scheme + ".castr"
		list = append(list, &place{
			name: name, destination: tagged(scheme), store: store, recorded: store,
			env: []string{"HOME=" + home, "SSH_AUTH_SOCK="},
			run: []string{"--volume", server.Key + ":/run/secrets/bootfs_key:ro"}, secrets: []string{strings.Split(string(key), "\n")[2]},
		})
	}
	s3, s3Env, s3Secrets := startS3(t, "chunks")
	list = append(list, &place{
		name: "S3", destination: tagged("s3"),
		store: "s3+http://" + s3.Address + "/chunks/rootfs.castr", recorded: "s3+http://" + s3.Address + "/chunks/rootfs.castr?region=" + s3.Region,
		env: s3Env, run: []string{"--volume", s3Secrets + ":/.bootfs/secrets:ro"}, secrets: []string{s3.SecretKey},
	})
	layout := filepath.Join(dir, "layout")
	list = append(list, &place{
		name: "OCI layout", destination: "oci:" + layout + ":converted", image: tagged("layout"),
		run: []string{"--env", "BLOB_STORE=oci:/layout", "--volume", layout + ":/layout:ro"},
		before: func(t *testing.T) {
			// Of the layout, the registry gets what an engine pulls.
			cmd := exec.CommandContext(t.Context(), "skopeo", "copy", "--quiet", "--dest-tls-verify=false", "oci:"+layout+":converted", "docker://"+tagged("layout"))
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Fatalf("skopeo: %v\n%s", err, out)
			}
		},
	})
	for _, p := range list {
		if p.image == "" {
			p.image = p.destination
		}
	}
	return list
}

// startS3 starts an S3 server with a bucket until the test ends. env lets the
// converter in, and the directory secrets containers.
func startS3(t *testing.T, bucket string) (server *testenv.S3, env []string, secrets string) {
	t.Helper()
	server, err := testenv.StartS3(t.Context(), t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	stopAtEnd(t, server)
	if err := server.MakeBucket(bucket); err != nil {
		t.Fatal(err)
	}
	env = []string{"AWS_ACCESS_KEY_ID=" + server.AccessKey, "AWS_SECRET_ACCESS_KEY=" + server.SecretKey, "AWS_REGION=" + server.Region}
	secrets = t.TempDir()
	profile := fmt.Sprintf("[default]\naws_access_key_id = %s\naws_secret_access_key = %s\n", server.AccessKey, server.SecretKey)
	if err := os.WriteFile(filepath.Join(secrets, "credentials"), []byte(profile), 0o600); err != nil {
		t.Fatal(err)
	}
	return server, env, secrets
}

func stopAtEnd(t *testing.T, c io.Closer) {
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
}
