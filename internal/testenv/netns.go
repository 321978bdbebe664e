package testenv

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
)

// Pod is a network namespace for containers, apart from the host's and joined
// to it by a veth pair: a container started with --network=Pod.Network is a
// host of its own. Nothing outside this machine can be reached from it.
type Pod struct {
	Network string // value of docker run's --network
	Address string // IPv4 address inside
	Host    string // IPv4 address of the host's end

	docker    *Docker
	container string
	link      string

	mu        sync.Mutex // guards the two below
	listeners []net.Listener
	conns     map[net.Conn]bool
	wg        sync.WaitGroup
}

// StartPod makes a Pod. The image must be in the engine; its program, started
// with args, must wait: it holds the namespace.
func StartPod(ctx context.Context, d *Docker, image string, args ...string) (*Pod, error) {
	out, err := d.Output(ctx, append([]string{"run", "--detach", "--network=none", image}, args...)...)
	if err != nil {
		return nil, err
	}
	p := &Pod{docker: d, container: strings.TrimSpace(out), conns: map[net.Conn]bool{}}
	p.Network = "container:" + p.container
	if err := p.connect(ctx); err != nil {
		return nil, errors.Join(err, p.Close())
	}
	return p, nil
}

func (p *Pod) connect(ctx context.Context) error {
	out, err := p.docker.Output(ctx, "inspect", "--format={{.State.Pid}}", p.container)
	if err != nil {
		return err
	}
	pid, err := strconv.Atoi(strings.TrimSpace(out))
	if err != nil || pid == 0 {
		return fmt.Errorf("container %s does not run: its pid is %q", p.container, strings.TrimSpace(out))
	}
	// The pid makes name and addresses unique on this machine: a /30 network
	// of 10.64.0.0/10.
	p.link = "bootfs" + strconv.Itoa(pid)
	n := pid % (1 << 20) * 4
	addr := func(i int) string {
		v := n + i
		return fmt.Sprintf("10.%d.%d.%d", 64+v>>16, v>>8&255, v&255)
	}
	p.Host, p.Address = addr(1), addr(2)
	inside := []string{"--target", strconv.Itoa(pid), "--net", "ip"}
	for _, c := range [][]string{
		{"ip", "link", "add", p.link, "type", "veth", "peer", "name", "eth0", "netns", strconv.Itoa(pid)},
		{"ip", "addr", "add", p.Host + "/30", "dev", p.link},
		{"ip", "link", "set", p.link, "up"},
		append(append([]string{"nsenter"}, inside...), "addr", "add", p.Address+"/30", "dev", "eth0"),
		append(append([]string{"nsenter"}, inside...), "link", "set", "eth0", "up"),
		append(append([]string{"nsenter"}, inside...), "route", "add", "default", "via", p.Host),
	} {
		if _, err := run(ctx, c[0], c[1:]...); err != nil {
			return err
		}
	}
	return nil
}

// Forward makes a server of the host reachable from the Pod: it returns the
// address, on the host's end, that leads to target.
func (p *Pod) Forward(target string) (string, error) {
	l, err := net.Listen("tcp4", net.JoinHostPort(p.Host, "0"))
	if err != nil {
		return "", err
	}
	p.mu.Lock()
	p.listeners = append(p.listeners, l)
	p.mu.Unlock()
	p.wg.Go(func() {
		for {
			in, err := l.Accept()
			if err != nil {
				return // closed
			}
			p.wg.Go(func() { p.relay(in, target) })
		}
	})
	return l.Addr().String(), nil
}

func (p *Pod) relay(in net.Conn, target string) {
	defer in.Close()
	out, err := net.Dial("tcp4", target)
	if err != nil {
		return // the other side sees the end of the connection
	}
	defer out.Close()
	p.mu.Lock()
	p.conns[in], p.conns[out] = true, true
	p.mu.Unlock()
	done := make(chan struct{})
	go func() {
		io.Copy(out, in)
		out.(*net.TCPConn).CloseWrite()
		close(done)
	}()
	io.Copy(in, out)
	in.(*net.TCPConn).CloseWrite()
	<-done
	p.mu.Lock()
	delete(p.conns, in)
	delete(p.conns, out)
	p.mu.Unlock()
}

// Close ends the forwarding and removes the namespace. Containers in it keep
// what they have of it until they end.
func (p *Pod) Close() error {
	var errs []error
	p.mu.Lock()
	for _, l := range p.listeners {
		l.Close()
	}
	for c := range p.conns {
		c.Close()
	}
	p.mu.Unlock()
	p.wg.Wait()
	ctx := context.Background()
	if _, err := os.Stat("/sys/class/net/" + p.link); p.link != "" && err == nil {
		_, err := run(ctx, "ip", "link", "del", p.link)
		errs = append(errs, err)
	}
	_, err := p.docker.Output(ctx, "rm", "--force", "--volumes", p.container)
	return errors.Join(append(errs, err)...)
}
