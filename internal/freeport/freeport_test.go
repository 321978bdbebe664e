package freeport

import (
	"net"
	"strconv"
	"testing"
)

func TestAddress(t *testing.T) {
	kernels, err := kernelsLowest()
	if err != nil {
		t.Fatal(err)
	}
	given := map[string]bool{}
	for range 100 {
		address, err := Address()
		if err != nil {
			t.Fatal(err)
		}
		host, port, err := net.SplitHostPort(address)
		if err != nil {
			t.Fatal(err)
		}
		if n, err := strconv.Atoi(port); err != nil || host != "127.0.0.1" || n < lowest || n >= kernels || given[port] {
			t.Errorf("got %s, want a new port of 127.0.0.1 from %d to %d", address, lowest, kernels-1)
		}
		given[port] = true
	}
}

// One that is listened at is not given.
func TestListen(t *testing.T) {
	l, err := Listen()
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	next.Add(^uint32(0)) // the same once more
	address, err := Address()
	if err != nil {
		t.Fatal(err)
	}
	if address == l.Addr().String() {
		t.Errorf("got %s, at which somebody listens", address)
	}
}
