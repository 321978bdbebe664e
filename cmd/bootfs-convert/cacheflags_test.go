package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/container-bootfs/bootfs/internal/convert"
)

func TestParseCaches(t *testing.T) {
	wd, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		value string
		want  convert.CachePlace
		err   string
	}{
		{"type=local,src=dir", convert.CachePlace{Dir: filepath.Join(wd, "dir")}, ""},
		{"src=/dir,type=local", convert.CachePlace{Dir: "/dir"}, ""},
		{"./dir", convert.CachePlace{Dir: filepath.Join(wd, "dir")}, ""},
		{"/dir,a=b", convert.CachePlace{Dir: "/dir,a=b"}, ""},
		{"type=registry,ref=host:5000/a/b:c", convert.CachePlace{Ref: "host:5000/a/b:c"}, ""},
		{"host:5000/a/b:c", convert.CachePlace{Ref: "host:5000/a/b:c"}, ""},
		{"docker://user/app", convert.CachePlace{Ref: "user/app"}, ""},
		{"type=inline", convert.CachePlace{Inline: true}, ""},
		{"type=local", convert.CachePlace{}, "src=… is missing"},
		{"type=local,dest=dir", convert.CachePlace{}, "src=… is missing"},
		{"type=registry", convert.CachePlace{}, "ref=… is missing"},
		{"type=registry,ref=a,ref=b", convert.CachePlace{}, "want each KEY=VALUE once"},
		{"type=registry,ref=a,mode=max", convert.CachePlace{}, "there is no mode= here"},
		{"type=registry,ref=oci:dir", convert.CachePlace{}, "oci:dir is not in a registry"},
		{"type=inline,ref=a", convert.CachePlace{}, "there is no ref= here"},
		{"type=s3,bucket=b", convert.CachePlace{}, `type "s3": want local, registry or inline`},
		{"UPPER", convert.CachePlace{}, "UPPER"},
		{"", convert.CachePlace{}, "ref=… is missing"},
	} {
		got, err := parseCaches("--cache-from", "src", []string{tt.value})
		switch {
		case tt.err != "":
			if err == nil || !strings.Contains(err.Error(), tt.err) || !strings.HasPrefix(err.Error(), "--cache-from "+tt.value+": ") {
				t.Errorf("%q: %v, %v; want an error with %q", tt.value, got, err, tt.err)
			}
		case err != nil || len(got) != 1 || got[0] != tt.want:
			t.Errorf("%q: %v, %v; want %v", tt.value, got, err, tt.want)
		}
	}
}
