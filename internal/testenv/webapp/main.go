// Command webapp is the one file of a small test image: a web server that
// needs nothing beside it. With arguments it prints them and ends.
//
//	GET /        says ok, and who the server is
//	GET /files   lists the root directory, but for what engines and bootfs put there
//	GET /lookup  what a program is told that looks for the files that the image lacks
package main

import (
	"context"
	"crypto/x509"
	"fmt"
	"net/http"
	"os"
	"os/signal"
	"os/user"
	"strconv"
	"syscall"
	"time"
)

func main() {
	if len(os.Args) > 1 {
		fmt.Println("no server:", os.Args[1:])
		return
	}
	if err := serve(); err != nil {
		fmt.Fprintln(os.Stderr, "webapp:", err)
		os.Exit(1)
	}
}

func serve() error {
	http.HandleFunc("GET /{$}", func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintln(w, "ok", os.Getpid(), os.Getuid(), os.Getgid())
	})
	http.HandleFunc("GET /files", func(w http.ResponseWriter, r *http.Request) {
		for _, name := range []string{"/webapp", "/etc/passwd", "/etc/group", "/etc/ssl", "/bin", "/lib", "/tmp"} {
			_, err := os.Stat(name)
			fmt.Fprintln(w, name, err)
		}
	})
	http.HandleFunc("GET /lookup", func(w http.ResponseWriter, r *http.Request) {
		_, err := user.LookupId(strconv.Itoa(os.Getuid()))
		fmt.Fprintln(w, err)
		_, err = time.LoadLocation("Europe/Berlin")
		fmt.Fprintln(w, err)
		roots, err := x509.SystemCertPool()
		fmt.Fprintln(w, roots.Equal(x509.NewCertPool()), err)
		_, err = os.CreateTemp("", "")
		fmt.Fprintln(w, err != nil)
	})
	server := &http.Server{Addr: "127.0.0.1:" + os.Getenv("PORT")}
	stop, cancel := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer cancel()
	done := make(chan error, 1)
	go func() {
		<-stop.Done()
		fmt.Println("closing")
		done <- server.Shutdown(context.Background())
	}()
	fmt.Println("listening")
	if err := server.ListenAndServe(); err != http.ErrServerClosed {
		return err
	}
	return <-done
}
