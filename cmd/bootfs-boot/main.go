// Command bootfs-boot is PID 1 of a converted image: it makes the image's root
// filesystem and runs the entrypoint in it. See package boot.
package main

import (
	"os"

	"github.com/container-bootfs/bootfs/internal/boot"
)

func main() {
	os.Exit(boot.Main())
}
