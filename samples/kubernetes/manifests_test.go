// Package kubernetes has the manifests that a user copies, and their tests.
package kubernetes

import (
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/util/yaml"
	"k8s.io/pod-security-admission/api"
	"k8s.io/pod-security-admission/policy"
)

// decode reads the objects of a manifest as the API server does when it is told
// to be strict: of known kinds, with known fields of the right types, each once.
func decode(t *testing.T, file string) []runtime.Object {
	t.Helper()
	scheme := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{corev1.AddToScheme, appsv1.AddToScheme} {
		if err := add(scheme); err != nil {
			t.Fatal(err)
		}
	}
	decoder := serializer.NewCodecFactory(scheme, serializer.EnableStrict).UniversalDeserializer()
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var objects []runtime.Object
	for docs := yaml.NewDocumentDecoder(io.NopCloser(bytes.NewReader(text))); ; {
		doc := make([]byte, len(text))
		n, err := docs.Read(doc)
		if errors.Is(err, io.EOF) {
			return objects
		}
		if err != nil {
			t.Fatal(err)
		}
		object, _, err := decoder.Decode(doc[:n], nil, nil)
		if err != nil {
			t.Fatal(err)
		}
		objects = append(objects, object)
	}
}

// pod returns what an object makes pods of.
func pod(t *testing.T, object runtime.Object) (*metav1.ObjectMeta, *corev1.PodSpec) {
	t.Helper()
	switch o := object.(type) {
	case *corev1.Pod:
		return &o.ObjectMeta, &o.Spec
	case *appsv1.Deployment:
		return &o.Spec.Template.ObjectMeta, &o.Spec.Template.Spec
	case *appsv1.DaemonSet:
		return &o.Spec.Template.ObjectMeta, &o.Spec.Template.Spec
	}
	t.Fatalf("no pods in a %T", object)
	return nil, nil
}

// TestManifests wants of each manifest what the README says of it: that a
// strict API server takes it, and which level of PodSecurity admits it.
func TestManifests(t *testing.T) {
	evaluator, err := policy.NewEvaluator(policy.DefaultChecks(), nil)
	if err != nil {
		t.Fatal(err)
	}
	levels := map[string]api.Level{ // the strictest that admits it
		"device-plugin.yaml": api.LevelPrivileged,
		"fuse.yaml":          api.LevelPrivileged,
		"userns.yaml":        api.LevelPrivileged,
		"plain.yaml":         api.LevelBaseline,
	}
	files, err := filepath.Glob("*.yaml")
	if err != nil {
		t.Fatal(err)
	}
	if len(files) != len(levels) {
		t.Errorf("the manifests are %q, want the %d that are listed here", files, len(levels))
	}
	for _, file := range files {
		t.Run(file, func(t *testing.T) {
			objects := decode(t, file)
			if len(objects) == 0 {
				t.Fatal("no object")
			}
			for _, o := range objects {
				meta, spec := pod(t, o)
				admitted := api.LevelPrivileged
				for _, level := range []api.Level{api.LevelBaseline, api.LevelRestricted} {
					results := evaluator.EvaluatePod(api.LevelVersion{Level: level, Version: api.LatestVersion()}, meta, spec)
					if !policy.AggregateCheckResults(results).Allowed {
						break
					}
					admitted = level
				}
				if admitted != levels[file] {
					t.Errorf("the strictest level that admits it is %s, want %s", admitted, levels[file])
				}
				consistent(t, spec)
			}
		})
	}
}

// consistent checks what the schema does not: names that must be one.
func consistent(t *testing.T, spec *corev1.PodSpec) {
	t.Helper()
	var volumes, mounted []string
	for _, v := range spec.Volumes {
		volumes = append(volumes, v.Name)
		if v.Secret != nil && !slices.Contains(spec.ImagePullSecrets, corev1.LocalObjectReference{Name: v.Secret.SecretName}) {
			t.Errorf("secret %s is mounted, and the kubelet does not get it", v.Secret.SecretName)
		}
	}
	for _, c := range spec.Containers {
		var ports []string
		for _, p := range c.Ports {
			ports = append(ports, p.Name)
		}
		for _, p := range []*corev1.Probe{c.StartupProbe, c.LivenessProbe, c.ReadinessProbe} {
			if p != nil && p.HTTPGet != nil && !slices.Contains(ports, p.HTTPGet.Port.StrVal) {
				t.Errorf("a probe asks port %q, the container has %q", p.HTTPGet.Port.StrVal, ports)
			}
		}
		for _, m := range c.VolumeMounts {
			mounted = append(mounted, m.Name)
		}
	}
	slices.Sort(volumes)
	slices.Sort(mounted)
	if !slices.Equal(volumes, mounted) {
		t.Errorf("the volumes are %q, mounted are %q", volumes, mounted)
	}
}
