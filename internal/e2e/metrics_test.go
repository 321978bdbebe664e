package e2e

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
)

// TestMetrics scrapes a container as Prometheus does, at a port and at a socket
// in a volume, and finds what the status says.
func TestMetrics(t *testing.T) {
	_, image := fidelityImage(t, "plain")
	volume := t.TempDir()
	address := net.JoinHostPort("127.0.0.1", freePort(t))
	for _, tt := range []struct {
		name, network, address string
		flags                  []string
	}{
		{"port", "tcp", address, []string{"--env", "BOOTFS_METRICS=" + address}},
		{"socket", "unix", filepath.Join(volume, "boot.sock"), []string{"--volume", volume + ":/metrics", "--env", "BOOTFS_METRICS=unix:/metrics/boot.sock"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			id := start(t, append(tt.flags, "--env", "BOOTFS_PREFETCH=none", image, "sleep", "600")...)
			client := http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
				return new(net.Dialer).DialContext(ctx, tt.network, tt.address)
			}}}
			defer client.CloseIdleConnections()
			var values map[string]float64
			eventually(t, "metrics of a program that has read", func() bool {
				var err error
				values, err = scrape(&client)
				return err == nil && values["bootfs_reads_total"] > 0 && values["bootfs_reads_waiting"] == 0
			})
			s := statusOf(t, id)
			for name, want := range map[string]float64{
				"bootfs_info": 1, "bootfs_image_chunks": float64(s.Image.Chunks), "bootfs_store_up": 1, "bootfs_store_failures_total": 0,
				"bootfs_reads_failed_total": 0,
			} {
				if got, ok := values[name]; !ok || got != want {
					t.Errorf("%s: got %v, %v, want %v", name, got, ok, want)
				}
			}
			// The exec that asked for the status has read, too.
			if got := values["bootfs_store_chunks_total"]; got == 0 || got > float64(s.Stores[0].Chunks) {
				t.Errorf("bootfs_store_chunks_total: got %v, want at most %d", got, s.Stores[0].Chunks)
			}
			if values["go_goroutines"] == 0 || values["process_open_fds"] == 0 {
				t.Errorf("%v", values)
			}
		})
	}

	// The program must not lead boot to a place of its own.
	r := run(t, "--env", "BOOTFS_METRICS=unix:/etc/boot.sock", image, "true")
	if !strings.Contains(r.stderr, "bootfs: metrics cannot be served at /etc/boot.sock: ") {
		t.Errorf("a socket that is in no volume: exit %d, %s", r.code, r.stderr)
	}
}

// scrape returns the metrics that are served, each family by its first value.
func scrape(client *http.Client) (map[string]float64, error) {
	r, err := client.Get("http://boot/metrics")
	if err != nil {
		return nil, err
	}
	defer r.Body.Close()
	if r.StatusCode != http.StatusOK {
		return nil, errors.New(r.Status)
	}
	p := expfmt.NewTextParser(model.UTF8Validation)
	families, err := p.TextToMetricFamilies(r.Body)
	if err != nil {
		return nil, err
	}
	values := map[string]float64{}
	for name, f := range families {
		values[name] = f.Metric[0].GetCounter().GetValue() + f.Metric[0].GetGauge().GetValue()
	}
	return values, nil
}

// TestPrometheusSample: Prometheus takes the configuration and the alerts of
// samples/prometheus, finds nothing wrong with the metrics of a container and of the
// keeper, and scrapes both. Compose takes the files of the samples.
func TestPrometheusSample(t *testing.T) {
	for _, sample := range []string{"prometheus", "cache"} {
		cmd := exec.Command("docker-compose", "-f", "../../samples/"+sample+"/compose.yaml", "config", "--quiet")
		cmd.Env = append(os.Environ(), "IMAGE="+w.image)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("%s: %v\n%s", sample, err, out)
		}
	}
	dir := t.TempDir()
	address := func() string { return net.JoinHostPort("127.0.0.1", freePort(t)) }
	app, cache, server := address(), address(), address()
	for file, changes := range map[string][]string{"prometheus.yml": {"app:9100", app, "cache:9464", cache, "30s", "1s"}, "rules.yml": nil} {
		text, err := os.ReadFile("../../samples/prometheus/" + file)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, file), []byte(strings.NewReplacer(changes...).Replace(string(text))), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	config := filepath.Join(dir, "prometheus.yml")
	if out, err := exec.Command("promtool", "check", "config", config).CombinedOutput(); err != nil || !strings.Contains(string(out), "6 rules found") {
		t.Fatalf("%v\n%s", err, out)
	}
	keeper := filepath.Join(dir, "bootfs-cache")
	if err := build(keeper, "../../cmd/bootfs-cache"); err != nil {
		t.Fatal(err)
	}
	inBackground(t, keeper, "--metrics", cache, "--interval", "1s", t.TempDir())
	inBackground(t, "prometheus", "--config.file", config, "--storage.tsdb.path", filepath.Join(dir, "data"), "--web.listen-address", server)
	_, image := fidelityImage(t, "plain")
	start(t, "--env", "BOOTFS_METRICS="+app, image, "sleep", "600")

	for _, from := range []string{app, cache} {
		var page string
		eventually(t, "metrics at "+from, func() bool {
			page = body("http://" + from + "/metrics")
			return strings.Contains(page, "bootfs_")
		})
		lint := exec.Command("promtool", "check", "metrics")
		lint.Stdin = strings.NewReader(page)
		if out, err := lint.CombinedOutput(); err != nil {
			t.Errorf("%s: %v\n%s", from, err, out)
		}
	}
	for _, job := range []string{"bootfs", "bootfs-cache"} {
		eventually(t, "Prometheus has scraped "+job, func() bool {
			return strings.Contains(body("http://"+server+"/api/v1/query?query="+url.QueryEscape(`up{job="`+job+`"} == 1`)), `"job":"`+job+`"`)
		})
	}
}

// inBackground runs a program until the test ends.
func inBackground(t *testing.T, name string, args ...string) {
	t.Helper()
	cmd := exec.Command(name, args...)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill() // it may have ended
		if err := cmd.Wait(); t.Failed() {
			t.Logf("%s: %v\n%s", name, err, out.Bytes())
		}
	})
}

// body returns what is at a URL, or the error.
func body(at string) string {
	r, err := http.Get(at)
	if err != nil {
		return err.Error()
	}
	defer r.Body.Close()
	text, err := io.ReadAll(r.Body)
	if err != nil {
		return err.Error()
	}
	return string(text)
}
