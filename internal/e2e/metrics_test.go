package e2e

import (
	"context"
	"errors"
	"net"
	"net/http"
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
	r := docker(t, "run", "--rm", "--network", "none", "--device", "/dev/fuse", "--cap-add", "SYS_ADMIN", "--env", "BOOTFS_METRICS=unix:/etc/boot.sock", image, "true")
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
