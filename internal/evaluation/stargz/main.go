// Command stargz is the stargz snapshotter as a server for containerd. Debian
// packages its client, ctr-remote, and not the server; the project's own command
// for it is in a module that cannot be installed by name.
//
//	stargz SOCKET DIR
package main

import (
	"context"
	"fmt"
	"net"
	"os"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/contrib/snapshotservice"
	"github.com/containerd/stargz-snapshotter/service"
	"google.golang.org/grpc"
)

func main() {
	if len(os.Args) != 3 {
		fmt.Fprintln(os.Stderr, "usage: stargz SOCKET DIR")
		os.Exit(2)
	}
	if err := serve(os.Args[1], os.Args[2]); err != nil {
		fmt.Fprintln(os.Stderr, "stargz:", err)
		os.Exit(1)
	}
}

// serve runs the snapshotter as it is without a configuration file.
func serve(socket, dir string) error {
	snapshotter, err := service.NewStargzSnapshotterService(context.Background(), dir, &service.Config{})
	if err != nil {
		return err
	}
	l, err := net.Listen("unix", socket)
	if err != nil {
		return err
	}
	s := grpc.NewServer()
	snapshotsapi.RegisterSnapshotsServer(s, snapshotservice.FromSnapshotter(snapshotter))
	return s.Serve(l)
}
