// Command bootfs-convert turns container images into ones that start before
// they are downloaded, and looks into the result.
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second signal ends the process at once
	code := run(ctx, os.Args[1:], stdio{os.Stdout, os.Stderr, os.Getenv})
	stop()
	os.Exit(code)
}
