package sshstore

import (
	"fmt"
	"strings"
	"testing"
	"time"
)

// BenchmarkSSHRead reads 1,000 chunks of 3,000 bytes over a line with a round
// trip of 20 ms: at once, as a prefetch does, and one after another, of which
// it reads 50 and tells what 1,000 would take.
func BenchmarkSSHRead(b *testing.B) {
	const (
		all   = 1000
		alone = 50
	)
	dir := b.TempDir()
	ids := fill(b, dir, all)
	for _, scheme := range []string{"ssh", "sftp"} {
		server := startServer(b)
		slow := startProxy(b, server.addr, 10*time.Millisecond)
		o := server.options()
		o.HostKeys = []string{strings.SplitN(server.hostKey, " ", 2)[1]}
		st := server.openAt(scheme, slow.addr, dir, o)
		if _, err := st.Get(b.Context(), ids[0], nil); err != nil { // connects
			b.Fatal(err)
		}
		perThousand := func(b *testing.B, chunks int) {
			b.ReportMetric(b.Elapsed().Seconds()/float64(b.N*chunks)*all, "s/1000chunks")
		}
		b.Run(fmt.Sprintf("%s/one at a time", scheme), func(b *testing.B) {
			for b.Loop() {
				for _, id := range ids[:alone] {
					if _, err := st.Get(b.Context(), id, nil); err != nil {
						b.Fatal(err)
					}
				}
			}
			perThousand(b, alone)
		})
		b.Run(fmt.Sprintf("%s/at once", scheme), func(b *testing.B) {
			for b.Loop() {
				n := 0
				if err := st.GetBatch(b.Context(), ids, func(int, []byte) error { n++; return nil }); err != nil || n != all {
					b.Fatalf("got %d chunks, %v", n, err)
				}
			}
			perThousand(b, all)
		})
	}
}
