package boot

import (
	"strings"
	"testing"

	"github.com/container-bootfs/bootfs/internal/metrics"
)

// TestFillPage: a store's name, which an image has, is a label and nothing else.
func TestFillPage(t *testing.T) {
	var p metrics.Page
	(&status{Stores: []storeStatus{{Name: "a\"b\\c\nd"}}}).fillPage(&p)
	if want := `bootfs_store_up{store="a\"b\\c\nd",place="0"} 0` + "\n"; !strings.Contains(p.String(), want) {
		t.Errorf("want %s in\n%s", want, p.String())
	}
}
