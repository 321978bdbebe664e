// Package freeport finds TCP ports of the loopback for servers of tests that
// are told their port, or that give it up for a while.
//
// A port that the kernel chose is anybody's once it is closed: the next listener
// or outgoing connection may be given it. Those found here are none that the
// kernel gives.
package freeport

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"strconv"
	"strings"
	"sync/atomic"
)

// lowest is the lowest port that is given.
const lowest = 15000

// kernelsLowest is the lowest port that the kernel chooses.
func kernelsLowest() (int, error) {
	b, err := os.ReadFile("/proc/sys/net/ipv4/ip_local_port_range")
	if err != nil {
		return 0, err
	}
	first, _, _ := strings.Cut(strings.TrimSpace(string(b)), "\t")
	return strconv.Atoi(first)
}

// next is the port to try next, counted from lowest: one that was given in this
// process is not given again for long, and two processes begin apart.
var next atomic.Uint32

func init() { next.Store(rand.Uint32N(1 << 20)) }

// Listen listens at a free port of 127.0.0.1.
func Listen() (net.Listener, error) {
	end, err := kernelsLowest()
	if err != nil {
		return nil, err
	}
	if end <= lowest {
		return nil, fmt.Errorf("the kernel gives ports from %d on, want none below %d", end, lowest+1)
	}
	for range end - lowest {
		port := lowest + int(next.Add(1))%(end-lowest)
		l, err := net.Listen("tcp4", net.JoinHostPort("127.0.0.1", strconv.Itoa(port)))
		if err == nil {
			return l, nil
		}
	}
	return nil, errors.New("no port is free")
}

// Address returns the host:port of a free port of 127.0.0.1.
func Address() (string, error) {
	l, err := Listen()
	if err != nil {
		return "", err
	}
	return l.Addr().String(), l.Close()
}
