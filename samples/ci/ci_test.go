// Package ci has the pipelines that a user copies, and their test.
package ci

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"k8s.io/apimachinery/pkg/util/yaml"
)

// calls matches what the pipelines call the converter, with the rest of its
// line and of those that it goes on in.
var calls = regexp.MustCompile(`(?m)^(?:bootfs-)?convert (?:[^\n]*\\\n)*[^\n]*`)

// TestPipelines wants scripts that a shell can read, and flags of the converter
// that it has.
func TestPipelines(t *testing.T) {
	help, err := exec.Command("go", "run", "github.com/container-bootfs/bootfs/cmd/bootfs-convert", "--help").CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, help)
	}
	files, err := filepath.Glob("*.yaml")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		t.Run(file, func(t *testing.T) {
			text, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			var pipeline map[string]any
			if err := yaml.UnmarshalStrict(text, &pipeline); err != nil {
				t.Fatal(err)
			}
			found := 0
			for _, script := range scripts(pipeline) {
				if out, err := exec.Command("bash", "-n", "-c", script).CombinedOutput(); err != nil {
					t.Errorf("%v: %s\n%s", err, out, script)
				}
				for _, call := range calls.FindAllString(script, -1) {
					found++
					for word := range strings.FieldsSeq(call) {
						if strings.HasPrefix(word, "--") && !strings.Contains(string(help), " "+word+" ") {
							t.Errorf("bootfs-convert has no flag %s", word)
						}
					}
				}
			}
			if found != 2 {
				t.Errorf("%d calls of bootfs-convert, want one that converts and one that checks", found)
			}
		})
	}
}

// scripts returns the shell scripts of a pipeline: what stands under run,
// script and before_script.
func scripts(v any) []string {
	var found []string
	switch v := v.(type) {
	case map[string]any:
		for key, value := range v {
			if key != "run" && key != "script" && key != "before_script" {
				found = append(found, scripts(value)...)
				continue
			}
			switch value := value.(type) {
			case string:
				found = append(found, value)
			case []any:
				for _, line := range value {
					found = append(found, line.(string))
				}
			}
		}
	case []any:
		for _, value := range v {
			found = append(found, scripts(value)...)
		}
	}
	return found
}
