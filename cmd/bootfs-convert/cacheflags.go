package main

import (
	"path/filepath"
	"strings"

	"github.com/container-bootfs/bootfs/internal/convert"
	"github.com/container-bootfs/bootfs/internal/transport"
)

// parseCaches reads the values of --cache-from or --cache-to, as BuildKit's
// users write them: type=local,src=DIR (dest=DIR where it is written),
// type=registry,ref=REF, type=inline, or DIR or REF alone. A directory alone
// begins with a slash or a dot.
func parseCaches(flag, dirKey string, values []string) ([]convert.CachePlace, error) {
	var out []convert.CachePlace
	for _, v := range values {
		p, err := parseCache(dirKey, v)
		if err != nil {
			return nil, usagef("%s %s: %w", flag, v, err)
		}
		out = append(out, p)
	}
	return out, nil
}

func parseCache(dirKey, value string) (p convert.CachePlace, err error) {
	fields := map[string]string{}
	switch {
	case strings.HasPrefix(value, "/") || strings.HasPrefix(value, "."):
		fields["type"], fields[dirKey] = "local", value
	case !strings.Contains(value, "="):
		fields["type"], fields["ref"] = "registry", value
	default:
		for f := range strings.SplitSeq(value, ",") {
			k, v, ok := strings.Cut(f, "=")
			if _, twice := fields[k]; !ok || twice {
				return p, usagef("%q: want each KEY=VALUE once", f)
			}
			fields[k] = v
		}
	}
	want := ""
	switch fields["type"] {
	case "local":
		want = dirKey
		if fields[want] != "" {
			p.Dir, err = filepath.Abs(fields[want])
		}
	case "registry":
		want, p.Ref = "ref", fields["ref"]
		if p.Ref != "" {
			var r transport.Ref
			if r, err = transport.Parse(p.Ref, ""); err == nil && r.Transport != transport.Registry {
				err = usagef("%s is not in a registry", r)
			}
			p.Ref = r.Name
		}
	case "inline":
		p.Inline = true
	default:
		return p, usagef("type %q: want local, registry or inline", fields["type"])
	}
	if want != "" && fields[want] == "" {
		return p, usagef("%s=… is missing", want)
	}
	for k := range fields {
		if k != "type" && k != want {
			return p, usagef("there is no %s= here", k)
		}
	}
	return p, err
}
