package boot

import (
	"net"
	"strings"
	"testing"
	"time"

	"github.com/container-bootfs/bootfs/internal/freeport"
)

func TestRecording(t *testing.T) {
	for value, want := range map[string]recording{
		"":           {},
		"exit":       {on: true},
		"port:1":     {on: true, port: 1},
		"port:65535": {on: true, port: 65535},
		"1.5s":       {on: true, time: 1500 * time.Millisecond},
	} {
		if got, err := parseRecording(value); err != nil || got != want {
			t.Errorf("%q: got %+v, %v, want %+v", value, got, err, want)
		}
	}
	for _, value := range []string{"1", "0s", "-1s", "port:", "port:0", "port:65536", "port:-1", "end", "5"} {
		if _, err := readSettings([]string{"BOOTFS_RECORD=" + value}); err == nil || !strings.Contains(err.Error(), "BOOTFS_RECORD") {
			t.Errorf("%q: got %v", value, err)
		}
	}
}

func TestListed(t *testing.T) {
	const list = `  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 00000000:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1 1 0 100 0 0 10 0
   1: 0100007F:0050 0100007F:C350 01 00000000:00000000 00:00000000 00000000     0        0 2 1 0 20 4 30 10 -1
   2: 00000000000000000000000001000000:01BB 00000000000000000000000000000000:0000 0A 00000000:00000000 00:00000000
   3: 0100007F`
	for port, want := range map[uint16]bool{8080: true, 80: false, 50000: false, 443: true, 0x90: false, 1: false} {
		if got := listed([]byte(list), port); got != want {
			t.Errorf("port %d: got %v, want %v", port, got, want)
		}
	}
	l, err := freeport.Listen()
	if err != nil {
		t.Fatal(err)
	}
	port := uint16(l.Addr().(*net.TCPAddr).Port)
	if !listensAt(port) {
		t.Errorf("port %d: nobody listens there", port)
	}
	l.Close()
	if listensAt(port) {
		t.Errorf("port %d: somebody listens there still", port)
	}
}
