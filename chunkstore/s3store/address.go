package s3store

import (
	"errors"
	"fmt"
	"net"
	"net/url"
	"regexp"
	"strings"
	"sync"

	"github.com/container-bootfs/bootfs/chunkstore"
	"github.com/container-bootfs/bootfs/index"
	"github.com/container-bootfs/bootfs/internal/httpio"
)

const defaultRegion = "us-east-1"

// address is where a store lies, as its user names it.
type address struct {
	scheme  string // "https" or "http"
	host    string // of the endpoint, with its port unless it is the scheme's
	bucket  string
	prefix  string // of the keys: "" or with a slash at its end
	region  string // "" if the address does not say
	style   string // the same; "path" or "virtual"
	virtual bool   // a bucket has a host of its own
}

// place is where a store is found now: servers tell when a bucket is elsewhere.
type place struct{ host, region string }

// Is reports whether address is one that New takes.
func Is(address string) bool {
	return strings.HasPrefix(address, "s3+https://") || strings.HasPrefix(address, "s3+http://")
}

// pattern is a regular expression that is compiled when it is first used: what
// never speaks to S3 starts without that.
func pattern(expr string) func() *regexp.Regexp {
	return sync.OnceValue(func() *regexp.Regexp { return regexp.MustCompile(expr) })
}

var (
	bucketName = pattern(`^[A-Za-z0-9][A-Za-z0-9._-]{1,254}$`)
	regionName = pattern(`^[a-zA-Z0-9][a-zA-Z0-9_-]{0,63}$`)
)

// parseAddress reads an address. Its errors show nothing of what may be a
// credential.
func parseAddress(s string) (*address, error) {
	fail := func(why string) error {
		shown := httpio.WithoutUser(s)
		shown, _, _ = strings.Cut(shown, "?")
		return fmt.Errorf("store %q: %s: want s3+https://HOST/BUCKET[/PREFIX][?region=REGION&style=path|virtual]", shown, why)
	}
	u, err := url.Parse(strings.TrimPrefix(s, "s3+"))
	var query url.Values
	if err == nil {
		query, err = url.ParseQuery(u.RawQuery)
	}
	switch {
	case err != nil:
		return nil, fail("no address")
	case !Is(s):
		return nil, fail("unknown kind")
	case u.User != nil || strings.Contains(u.EscapedPath(), "@"):
		return nil, fail("credentials do not belong into an address")
	case u.Hostname() == "":
		return nil, fail("no host")
	case u.Fragment != "":
		return nil, fail("text behind the path")
	}
	a := &address{scheme: u.Scheme, host: strings.ToLower(u.Host)}
	if host, port, err := net.SplitHostPort(a.host); err == nil && (port == "" || port == map[string]string{"https": "443", "http": "80"}[a.scheme]) {
		a.host = host // the port that is understood is not part of what is signed
		if strings.Contains(host, ":") {
			a.host = "[" + host + "]"
		}
	}
	bucket, prefix, _ := strings.Cut(strings.Trim(u.Path, "/"), "/")
	aws, isAWS := parseAWS(a.host)
	switch {
	case isAWS && aws.bucket != "":
		return nil, fail("the bucket belongs behind the host: s3+" + a.scheme + "://" + aws.String() + "/" + aws.bucket + "/…")
	case bucket == "":
		return nil, fail("no bucket")
	case !bucketName().MatchString(bucket):
		return nil, fail("that is no bucket's name")
	case strings.Contains("/"+prefix+"/", "/./"), strings.Contains("/"+prefix+"/", "/../"), strings.Contains(prefix, "//"):
		return nil, fail("the prefix is not clean")
	case strings.ContainsFunc(prefix, func(r rune) bool { return r < ' ' || r == 0x7f || r == '\uFFFD' }):
		return nil, fail("the prefix has characters that cannot be read")
	}
	if a.bucket = bucket; prefix != "" {
		a.prefix = prefix + "/"
	}
	// A bucket with a dot in its name fits no certificate of its own.
	a.virtual = isAWS && (a.scheme == "http" || !strings.Contains(bucket, "."))
	for name, values := range query {
		value := values[len(values)-1]
		switch name {
		case "region":
			if !regionName().MatchString(value) {
				return nil, fail("that is no region's name")
			}
			a.region = value
		case "style", "lookup": // the second is desync's
			switch value {
			case "path":
				a.style, a.virtual = "path", false
			case "virtual", "dns":
				a.style, a.virtual = "virtual", true
			case "auto":
			default:
				return nil, fail("an unknown " + name)
			}
		default:
			return nil, fail("an unknown option behind the path")
		}
	}
	if ip := net.ParseIP(u.Hostname()); ip != nil && a.virtual {
		return nil, fail("a bucket cannot have a host of its own at an IP address")
	}
	return a, nil
}

// String returns the address, with the region and the style that it named.
func (a *address) String() string {
	var options []string
	if a.region != "" {
		options = append(options, "region="+a.region)
	}
	if a.style != "" {
		options = append(options, "style="+a.style)
	}
	s := "s3+" + a.scheme + "://" + a.host + "/" + a.bucket
	if a.prefix != "" {
		s += "/" + escape(strings.TrimSuffix(a.prefix, "/"), true)
	}
	if len(options) > 0 {
		s += "?" + strings.Join(options, "&")
	}
	return s
}

// key returns the name of chunk id in its bucket.
func (a *address) key(id index.ID) string {
	shard, file := chunkstore.Place(id)
	return a.prefix + shard + "/" + file
}

// chunkOf returns the chunk that key names; of what else lies in a bucket there
// is none.
func (a *address) chunkOf(key string) (index.ID, bool) {
	name, ok := strings.CutPrefix(key, a.prefix)
	shard, file, slash := strings.Cut(name, "/")
	id, chunk := chunkstore.AtPlace(shard, file)
	return id, ok && slash && chunk
}

// url returns the URL of key, or of the bucket if key is "". query is escaped
// and sorted.
func (a *address) url(p *place, key, query string) *url.URL {
	u := &url.URL{Scheme: a.scheme, Host: p.host, Path: "/" + key, RawQuery: query}
	if a.virtual {
		u.Host = a.bucket + "." + p.host
	} else {
		u.Path = "/" + a.bucket
		if key != "" {
			u.Path += "/" + key
		}
	}
	u.RawPath = escape(u.Path, true)
	return u
}

// awsHost is the name of an endpoint of AWS's own S3.
type awsHost struct {
	bucket string // before the endpoint's name; "" for the endpoint itself
	kind   string // "s3", "s3-fips", with ".dualstack" where it is one
	region string // "" where it is understood
	domain string // "amazonaws.com" or that of another of AWS's partitions
}

var awsPattern = pattern(`^(?:(.+)\.)?(s3(?:-fips)?(?:\.dualstack)?)(?:[.-]([a-z]{2,4}(?:-[a-z]+)+-\d+))?\.(amazonaws\.com(?:\.cn)?|amazonaws\.eu|c2s\.ic\.gov|sc2s\.sgov\.gov)$`)

func parseAWS(host string) (awsHost, bool) {
	m := awsPattern().FindStringSubmatch(host)
	if m == nil {
		return awsHost{}, false
	}
	return awsHost{m[1], m[2], m[3], m[4]}, true
}

// String returns the name of the endpoint.
func (h awsHost) String() string {
	if h.region == "" {
		return h.kind + "." + h.domain
	}
	return h.kind + "." + h.region + "." + h.domain
}

// at returns the endpoint of the same kind for another region.
func (h awsHost) at(region string) (string, error) {
	h.bucket, h.region = "", region
	if got, ok := parseAWS(h.String()); !ok || got != h {
		return "", errors.New("no region of AWS")
	}
	return h.String(), nil
}
