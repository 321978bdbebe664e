package boot

import "os"

// engineRun names the command that starts containers in the engine at hand,
// for messages that ask for a flag. Engines whose flags have other names are
// not known apart.
func engineRun() string {
	if _, err := os.Lstat("/run/.containerenv"); err == nil {
		return "podman run"
	}
	if _, err := os.Lstat("/.dockerenv"); err == nil {
		return "docker run"
	}
	return "docker run (what ctr and Kubernetes have for it: docs/running.md)"
}
