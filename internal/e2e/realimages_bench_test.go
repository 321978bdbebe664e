package e2e

import (
	"slices"
	"testing"
	"time"

	"github.com/container-bootfs/bootfs/internal/testenv"
)

// firstSteps are what a start of a real image does first: the least that its
// program can be asked.
var firstSteps = map[string][]string{
	"postgres": {"postgres", "--describe-config"},
	"nginx":    {"nginx", "-t", "-q"},
	"redis":    {"redis-server", "--version"},
	"node":     {"node", "-e", "require('greet')('you'); require('https')"},
	"python":   {"python3", "-c", "import json, ssl, sqlite3"},
	"ruby":     {"ruby", "-rjson", "-ropenssl", "-e", "1"},
	"perl":     {"perl", "-MPOSIX", "-MIO::Socket", "-e1"},
	"go":       {"go", "env", "GOROOT"},
	"java":     {"javac", "-version"},
	"static":   {"/webapp", "version"},
}

// BenchmarkRealImages pulls each real image, which the engine has not, and runs
// it as far as its first step.
func BenchmarkRealImages(b *testing.B) {
	for _, name := range testenv.RealImageNames {
		b.Run(name, func(b *testing.B) {
			for _, s := range realSubjects(b, name) {
				b.Run(s.name, func(b *testing.B) {
					var pull, run time.Duration
					var pulled, fetched int64
					step := func(bytes *int64, took *time.Duration, args ...string) {
						began := time.Now()
						*bytes += w.proxy.measure(func() {
							if out, err := w.docker.Output(b.Context(), args...); err != nil {
								b.Fatal(err, out)
							}
						})
						*took += time.Since(began)
					}
					for b.Loop() {
						if out, err := w.docker.Output(b.Context(), "rmi", "--force", s.image); err != nil {
							b.Fatal(err, out)
						}
						step(&pulled, &pull, "pull", "--quiet", s.image)
						entrypoint := firstSteps[name][0]
						args := slices.Concat([]string{"run", "--rm", "--network", "host", "--entrypoint", entrypoint}, s.flags, []string{s.image}, firstSteps[name][1:])
						step(&fetched, &run, args...)
					}
					n := float64(b.N)
					b.ReportMetric(float64(pulled)/n/1e6, "MB-pulled")
					b.ReportMetric(float64(fetched)/n/1e6, "MB-fetched")
					b.ReportMetric(pull.Seconds()/n, "s-pull")
					b.ReportMetric(run.Seconds()/n, "s-run")
					b.ReportMetric(0, "ns/op")
				})
			}
		})
	}
}
