// Command bootfs-cache keeps a node cache: it evicts what was not used for the
// longest time, sweeps what killed containers have left, and tells Prometheus how
// the cache fares. Containers evict by themselves as well; a keeper does it while
// none of them writes, and by one setting for all.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/container-bootfs/bootfs/chunkstore/nodecache"
	"github.com/container-bootfs/bootfs/internal/metrics"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	os.Exit(run(ctx, os.Args[1:], os.Getenv, os.Stderr))
}

// Exit codes.
const (
	exitOK     = 0
	exitFailed = 1
	exitUsage  = 2
)

const usage = `Usage: bootfs-cache [FLAGS] [DIR]

Keep the node cache in DIR (default /.bootfs/rootfs.castr), the directory or volume
that containers have there: evict what was not used for the longest time, and
remove what killed writers have left.

`

// keeper is what the command line asks for.
type keeper struct {
	dir      string
	options  nodecache.Options
	interval time.Duration
	once     bool
	metrics  metrics.Address
	state    *state
}

// run keeps a cache until ctx ends, and returns the exit code.
func run(ctx context.Context, args []string, getenv func(string) string, stderr io.Writer) int {
	k, err := parse(args, getenv, stderr)
	if errors.Is(err, flag.ErrHelp) {
		return exitOK
	}
	if err != nil {
		fmt.Fprintf(stderr, "bootfs-cache: %v\n", err)
		return exitUsage
	}
	if err := k.keep(ctx); err != nil {
		fmt.Fprintf(stderr, "bootfs-cache: %v\n", err)
		return exitFailed
	}
	return exitOK
}

func parse(args []string, getenv func(string) string, stderr io.Writer) (*keeper, error) {
	k := &keeper{dir: "/.bootfs/rootfs.castr", state: &state{}}
	f := flag.NewFlagSet("bootfs-cache", flag.ContinueOnError)
	f.SetOutput(io.Discard)
	size := f.String("size", getenv("BOOTFS_CACHE_SIZE"), "`SIZE` of the disk that the chunks may take, as in 20GiB; 0 is any (default $BOOTFS_CACHE_SIZE, or any)")
	reserve := f.String("reserve", getenv("BOOTFS_CACHE_RESERVE"), "`SHARE` or size of the disk that stays free, as in 5% or 2GiB (default $BOOTFS_CACHE_RESERVE, or 5%, at most 10 GiB)")
	at := f.String("metrics", getenv("BOOTFS_METRICS"), "`ADDRESS` of metrics for Prometheus, [HOST]:PORT or unix:PATH (default $BOOTFS_METRICS, or none)")
	f.DurationVar(&k.interval, "interval", 30*time.Second, "`TIME` between two looks at the cache (default 30s)")
	f.BoolVar(&k.once, "once", false, "look once and exit")
	if err := f.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			fmt.Fprint(stderr, usage)
			f.VisitAll(func(one *flag.Flag) {
				value, help := flag.UnquoteUsage(one)
				fmt.Fprintf(stderr, "  --%-18s %s\n", one.Name+" "+value, help)
			})
		}
		return nil, err
	}
	switch f.NArg() {
	case 0:
	case 1:
		k.dir = f.Arg(0)
	default:
		return nil, fmt.Errorf("got %d arguments, want DIR", f.NArg())
	}
	k.options = nodecache.Options{Reserve: nodecache.DefaultReserve, Log: slog.New(slog.NewTextHandler(stderr, nil))}
	var err error
	if *size != "" {
		if k.options.Limit, err = nodecache.ParseSize(*size); err != nil {
			return nil, fmt.Errorf("--size, BOOTFS_CACHE_SIZE: %w", err)
		}
	}
	if *reserve != "" {
		if k.options.Reserve, err = nodecache.ParseReserve(*reserve); err != nil {
			return nil, fmt.Errorf("--reserve, BOOTFS_CACHE_RESERVE: %w", err)
		}
	}
	if k.metrics, err = metrics.ParseAddress(*at); err != nil {
		return nil, fmt.Errorf("--metrics, BOOTFS_METRICS: %w", err)
	}
	if k.interval < time.Second {
		return nil, fmt.Errorf("--interval %v: want 1s or more", k.interval)
	}
	return k, nil
}

// keep looks at the cache again and again. A cache that cannot be kept now may be
// one that can later: only what is asked once fails.
func (k *keeper) keep(ctx context.Context) error {
	if info, err := os.Stat(k.dir); err != nil {
		return err
	} else if !info.IsDir() {
		return fmt.Errorf("%s: %w", k.dir, syscall.ENOTDIR)
	}
	if !k.metrics.IsNowhere() {
		l, err := k.metrics.Listen(nil)
		if err != nil {
			return err
		}
		defer l.Close()
		go metrics.Serve(l, k.state.fill)
	}
	said := ""
	for {
		err := k.pass(ctx)
		if k.once || ctx.Err() != nil {
			if ctx.Err() != nil {
				err = nil
			}
			return err
		}
		if err == nil {
			said = ""
		} else if said != err.Error() {
			said = err.Error()
			k.options.Log.Warn(said)
		}
		select {
		case <-time.After(k.interval):
		case <-ctx.Done():
			return nil
		}
	}
}

// pass evicts and looks once.
func (k *keeper) pass(ctx context.Context) (err error) {
	defer func() {
		if err != nil && ctx.Err() == nil {
			k.state.failed()
		}
	}()
	cache, err := nodecache.Open(k.dir, k.options)
	if err != nil {
		return err
	}
	defer cache.Close()
	e, err := cache.Evict(ctx)
	if err != nil {
		return err
	}
	if e.Chunks > 0 || e.Leftovers > 0 {
		k.options.Log.Info("evicted", "chunks", e.Chunks, "bytes", e.Bytes, "leftovers", e.Leftovers, "before", e.Before)
	}
	u, err := cache.Usage(ctx, false)
	if err != nil {
		return err
	}
	k.state.passed(k.options.Limit, e, u)
	return nil
}
