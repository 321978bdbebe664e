package e2e

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/container-bootfs/bootfs/internal/testenv"
)

// TestS3 converts to a bucket and runs from it. Boot's credentials come from a
// file or from variables, and whose the variables are follows from that.
func TestS3(t *testing.T) {
	ctx := t.Context()
	server, err := testenv.StartS3(ctx, t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	stopAtEnd(t, server)
	if err := server.MakeBucket("chunks"); err != nil {
		t.Fatal(err)
	}
	cache, err := testenv.OpenCache()
	if err != nil {
		t.Fatal(err)
	}
	layout, err := cache.ScratchImage(ctx)
	if err != nil {
		t.Fatal(err)
	}
	keys := []string{"AWS_ACCESS_KEY_ID=" + server.AccessKey, "AWS_SECRET_ACCESS_KEY=" + server.SecretKey}
	convert := func(tag, store string) (image, index string, stores []string) {
		image = w.proxy.address + "/s3:" + tag
		cmd := w.command("--boot", w.boot, "--store", store, "oci:"+layout, image)
		cmd.Env = append(append(cmd.Env, keys...), "AWS_REGION="+server.Region)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("convert: %v\n%s", err, out)
		}
		index, stores = inspect(t, image)
		return image, index, stores
	}
	image, index, stores := convert("bucket", "s3+http://"+server.Address+"/chunks/rootfs.castr")
	// Boot does not have the converter's variables.
	if want := []string{"s3+http://" + server.Address + "/chunks/rootfs.castr?region=" + server.Region}; !slices.Equal(stores, want) {
		t.Errorf("the image records the stores %q, want %q", stores, want)
	}
	directory := t.TempDir()
	elsewhere, other, _ := convert("directory", filepath.Join(directory, "rootfs.castr"))
	if index == "" || index != other {
		t.Errorf("index %s in the bucket, %s in a directory", index, other)
	}

	file := filepath.Join(t.TempDir(), "credentials")
	profile := fmt.Sprintf("[default]\naws_access_key_id = %s\naws_secret_access_key = %s\n", server.AccessKey, server.SecretKey)
	if err := os.WriteFile(file, []byte(profile), 0o600); err != nil {
		t.Fatal(err)
	}
	variables := []string{"--env", keys[0], "--env", keys[1], "--env", "AWS_PROFILE=apps", "--env", "S3_REGION=eu-1"}
	for _, tt := range []struct {
		name  string
		flags []string
		image string
		want  []string // of the variables, those that the program has
	}{
		{"file", []string{"--volume", file + ":/run/secrets/bootfs-credentials:ro"}, image, nil},
		{"directory of secrets", []string{"--volume", filepath.Dir(file) + ":/.bootfs/secrets:ro"}, image, nil},
		{"file in the directory of secrets", []string{"--volume", file + ":/.bootfs/secrets/credentials:ro"}, image, nil},
		{"variables", variables, image, []string{"AWS_PROFILE=apps", "S3_REGION=eu-1"}},
		{"file beside the program's variables", []string{"--volume", file + ":/run/secrets/bootfs-credentials:ro",
			"--env", "AWS_ACCESS_KEY_ID=apps", "--env", "AWS_SECRET_ACCESS_KEY=apps", "--env", "AWS_SHARED_CREDENTIALS_FILE=/apps"}, image,
			[]string{"AWS_ACCESS_KEY_ID=apps", "AWS_SECRET_ACCESS_KEY=apps", "AWS_SHARED_CREDENTIALS_FILE=/apps"}},
		{"no store in S3", append([]string{"--volume", directory + ":" + directory + ":ro"}, variables...), elsewhere,
			[]string{keys[0], keys[1], "AWS_PROFILE=apps", "S3_REGION=eu-1"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := run(t, append(slices.Clone(tt.flags), "--env", "BOOTFS_LOG=debug", tt.image, "env")...)
			var view struct{ Env []string }
			if err := json.Unmarshal([]byte(r.stdout), &view); err != nil || r.code != 0 {
				t.Fatalf("exit %d, %v, stdout %q, stderr %q", r.code, err, r.stdout, r.stderr)
			}
			var got []string
			for _, v := range view.Env {
				if strings.HasPrefix(v, "AWS_") || strings.HasPrefix(v, "S3_") {
					got = append(got, v)
				}
			}
			slices.Sort(got)
			slices.Sort(tt.want)
			if !slices.Equal(got, tt.want) {
				t.Errorf("the program has %q, want %q", got, tt.want)
			}
			if strings.Contains(r.stderr, server.SecretKey) {
				t.Errorf("the log has the secret key: %s", r.stderr)
			}
		})
	}
	t.Run("without credentials", func(t *testing.T) {
		r := run(t, "--env", "AWS_EC2_METADATA_DISABLED=true", image, "env")
		if want := "no credentials were found, and the bucket is not everybody's: mount them as /.bootfs/secrets/credentials"; r.code != 125 || !strings.Contains(r.stderr, want) {
			t.Errorf("exit %d, %s, want 125 and %q", r.code, r.stderr, want)
		}
	})
	t.Run("a changed file", func(t *testing.T) {
		secrets := t.TempDir()
		write := func(key string) {
			next := filepath.Join(secrets, "next")
			if err := os.WriteFile(next, []byte(strings.Replace(profile, server.AccessKey, key, 1)), 0o600); err != nil {
				t.Fatal(err)
			}
			if err := os.Rename(next, filepath.Join(secrets, "credentials")); err != nil {
				t.Fatal(err)
			}
		}
		write("AKIAGONE")
		flags := []string{"--volume", secrets + ":/.bootfs/secrets:ro", "--env", "BOOTFS_PREFETCH=none"}
		if r := run(t, append(slices.Clone(flags), image, "env")...); r.code != 125 || !strings.Contains(r.stderr, "InvalidAccessKeyId: the server does not know the access key") {
			t.Errorf("with a key that is gone: exit %d, %s", r.code, r.stderr)
		}
		write(server.AccessKey)
		id := start(t, append(slices.Clone(flags), image, "sleep")...)
		eventually(t, "the container runs", func() bool { return docker(t, "exec", id, "/testapp", "status").code == 0 })
	})
}
